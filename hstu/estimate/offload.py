"""What a run keeps in memory of the host instead of on the device, and the time of copies and updates.

On a CPU a rank has one memory: nothing is moved, and the copies of a run that asks for it all the same are not timed.
"""

from __future__ import annotations

from hstu.estimate.dense_operators import ATTENTION
from hstu.estimate.machine import Machine
from hstu.estimate.memory import host_copy_bytes, layer_shape, trained_state_bytes
from hstu.estimate.operators import updates
from hstu.estimate.workload import Batch, Workload
from hstu.model.offload import Pieces
from hstu.ops.layer import saved_bytes, saved_tensors

_OF_LAYERS = ("residual and norm", "W_uvqk", "SiLU", ATTENTION, "norm, gate, dropout", "W_o")
"""Operators of the HSTU layers."""


def host_memory(workload: Workload) -> dict[str, int]:
    """Kind of memory → bytes on the host of a rank, for the largest batch. All but optimizer states are pinned."""
    found = {"activations": _pinned_activations(workload)}
    if workload.updates_on_host:
        found["dense weights and gradients"] = host_copy_bytes(workload)
        found["optimizer states"] = trained_state_bytes(workload)
    return {kind: count for kind, count in found.items() if count}


def _pinned_activations(workload: Workload) -> int:
    """Those of a micro-batch, whose memory the next one uses again."""
    pinned = 0
    for part in workload.layer_parts(workload.micro_batch(workload.largest)):
        if part.is_offloaded:
            saved = saved_tensors(part.network, *layer_shape(workload, part))
            saved["u"] = saved.pop("u", 0) + saved.pop("vqk", 0)  # views of one tensor
            number, size = Pieces.of(saved.values())
            pinned += len(part.spans) * number * size
    return pinned


def copied_bytes(workload: Workload, batch: Batch) -> int:
    """Bytes that the layers of a step copy to the host, and back again."""
    parts = (part for part in workload.layer_parts(batch) if part.is_offloaded)
    return sum(len(part.spans) * saved_bytes(part.network, *layer_shape(workload, part)) for part in parts)


def copy_seconds(workload: Workload, machine: Machine, batch: Batch, computing: dict[str, float]) -> float:
    """Seconds of a step by which copies of activations are slower than the layers that compute meanwhile."""
    one_way = _link_seconds(machine, copied_bytes(workload, batch))
    network = workload.config.network
    beside = sum(computing.get(name, 0.0) for name in _OF_LAYERS) * network.offload_num_layers / network.num_layers
    forward, backward = beside / 3, beside * 2 / 3  # what backward computes again makes it longer still
    return max(0.0, one_way - forward) + max(0.0, one_way - backward)


def update_seconds(workload: Workload, machine: Machine) -> float:
    """Seconds of an update of the dense weights on the host, which nothing hides.

    Gradients and weights are copied to it and weights back. The update is limited by the memory of the host.
    """
    if not workload.updates_on_host:
        return 0.0
    moved = sum(op.times * op.cost.bytes for op in updates(workload))
    in_memory = moved / (machine.host_memory_gb_s * 1e9 * machine.memory_efficiency)
    return in_memory + _link_seconds(machine, host_copy_bytes(workload) * 3 // 2)


def _link_seconds(machine: Machine, count: int) -> float:
    """Seconds for so many bytes to or from the host."""
    return count / (machine.host_link_gb_s * 1e9 * machine.link_efficiency)
