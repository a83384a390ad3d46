"""The collectives of a training step, each with the bytes that one rank contributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from hstu.config.args import RankingArgs
from hstu.data.batches.batch import is_of_negatives
from hstu.estimate.memory import FIRST_LAYER, INT64, TableShards, held_weights
from hstu.estimate.workload import Batch, Workload
from hstu.ops.costs import FLOAT32

DDP_BUCKET_BYTES = 25 << 20
"""torch's default for bucket_cap_mb."""


@dataclass(frozen=True)
class Transfer:
    """The collectives of a step that serve one purpose."""

    name: str
    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    group: Literal["world", "data", "shards", "replicas", "tensor", "context", "samples"]
    """shards: Mesh.shard_group. replicas: Mesh.replica_group. samples: the ranks of a tp_cp group."""
    ranks: int
    """Size of the group."""
    calls: int
    payload: int
    """Bytes of this rank's inputs to all calls together; of the busiest rank if ranks differ."""
    behind: Literal["backward", "weights", "pipeline", "nothing"] = "nothing"
    """What can hide it: all of backward, the product for the gradient of a layer's weight, or the steps before."""

    @property
    def wire(self) -> float:
        """Bytes that a rank must send at least: those of a ring for all_reduce, all but its own part for the others."""
        return sum(self.sent(self.ranks))

    def sent(self, on_host: int) -> tuple[float, float]:
        """Bytes that a rank must send (within its host, to other hosts), of whose ranks a host has ``on_host``.

        The ranks of a host first share what leaves it, so that each sends an equal part, and then share what arrives.
        """
        hosts = -(-self.ranks // on_host)
        near, far = on_host - 1, hosts - 1
        match self.kind:
            case "all_reduce":
                factors = 2 * near / on_host, 2 * far / hosts / on_host
            case "all_gather":
                factors = hosts * near, far
            case "reduce_scatter":
                factors = near / on_host, far / hosts / on_host
            case "all_to_all":
                factors = near / self.ranks, (self.ranks - on_host) / self.ranks
        return self.payload * factors[0], self.payload * factors[1]


def transfers(workload: Workload, batch: Batch, plan: tuple[TableShards, ...]) -> tuple[Transfer, ...]:
    """All transfers of a step on ``batch`` between at least two ranks."""
    found = [
        *_tables(workload, batch, plan),
        *_gathered_rows(workload, batch),
        *_layers(workload, batch),
        *_pool(workload, batch),
        *_gradients(workload, batch),
    ]
    return tuple(transfer for transfer in found if transfer.ranks > 1)


def _tables(workload: Workload, batch: Batch, plan: tuple[TableShards, ...]) -> Iterator[Transfer]:
    """TorchRec sends ids to the ranks with their rows, the rows back, and the gradients the same way as the ids.

    There is one exchange per collection (tables of one width) and kind of sharding.
    """
    ranks, own = workload.world_size, workload.ids_per_rank(batch)
    sequences = workload.config.trainer.sequences_per_iteration
    sent_ids = lengths = gradients = 0
    rows = np.zeros(ranks)
    for table in plan:
        count = sum(own.get(feature, 0) for feature in table.spec.features)
        by_rows = table.sharding == "row_wise"
        copies = 1 if by_rows else len(table.shards)
        sent_ids += count * copies * INT64
        lengths += len(table.spec.features) * sequences * (ranks if by_rows else copies) * INT64
        gradients += count * table.spec.stored_dim * FLOAT32
        for rank, _, columns in table.shards:  # each row goes to the rank that has looked it up
            rows[rank] += count * columns * FLOAT32 * (1 if by_rows else ranks)
    calls = len({(table.spec.stored_dim, table.sharding) for table in plan})
    world = partial(Transfer, kind="all_to_all", group="world", ranks=ranks)
    yield world("ids to their tables", calls=3 * calls, payload=sent_ids + lengths, behind="pipeline")
    yield world("rows of the tables", calls=calls, payload=int(rows.max()))
    yield world("gradients of the rows", calls=calls, payload=gradients)


def _gathered_rows(workload: Workload, batch: Batch) -> Iterator[Transfer]:
    """The ranks of a tp_cp group gather the looked-up rows of their samples, by one collective per width."""
    own, size = workload.ids_per_rank(batch), workload.group_size
    dims = {
        feature: spec.dim
        for spec in workload.specs
        for feature in spec.features
        if not spec.replicated and not (is_of_negatives(feature) and workload.shares_negatives)
    }
    payload = sum(own.get(feature, 0) * dim for feature, dim in dims.items()) * FLOAT32
    calls, labels = len(set(dims.values())), -(-batch.labels // size)
    lengths = workload.config.trainer.sequences_per_iteration * (len(own) + 4)
    pickled = INT64 * (sum(own.values()) + labels + lengths) + FLOAT32 * labels * workload.draws_per_label
    samples = partial(Transfer, group="samples", ranks=size)
    yield samples("samples of the group, on hosts", "all_gather", calls=2, payload=pickled)
    yield samples("rows of the group's samples", "all_gather", calls=calls, payload=payload)
    yield samples("their gradients", "reduce_scatter", calls=calls, payload=payload * size)


def _layers(workload: Workload, batch: Batch) -> Iterator[Transfer]:
    """Tensor, sequence and context parallelism within the layers (parallel/layer_comm.py)."""
    network, tp, c = workload.config.network, workload.tp_size, workload.element_size
    layers, tokens = network.num_layers, workload.tokens_of_layers(batch)
    forwards = 2 if network.recompute_layer else 1  # backward repeats what leads to the input of W_o
    passes, passed = forwards * layers, forwards * tokens
    tensor = partial(Transfer, group="tensor", ranks=tp)
    norms = 2 * (tokens + passed) * FLOAT32
    yield tensor("statistics of the output norm", "all_gather", calls=layers + passes, payload=norms)
    names = ["bias.position_weight", "bias.time_weight"]
    names += ["input_norm.weight", "input_norm.bias"] if network.sequence_parallel else []
    shared = [workload.dense_parameters.get(FIRST_LAYER + name, 0) for name in names]
    if calls := layers * sum(count > 0 for count in shared):
        payload = layers * sum(shared) * FLOAT32
        yield tensor("gradients of shared parameters", "all_reduce", calls=calls, payload=payload)
    width = tokens * network.hidden_size
    yield from _ends(workload, batch)
    channels = network.num_attention_heads * network.kv_channels // tp * c
    heads, passed_heads = tokens * channels, passed * channels
    context = partial(Transfer, kind="all_to_all", group="context", ranks=workload.cp_size)
    yield context("q, k, v by heads", calls=passes, payload=3 * passed_heads)
    if network.recompute_input_silu and not network.recompute_layer:
        yield context("q, k, v by heads, again", calls=layers, payload=3 * heads, behind="weights")
    yield context("what attention gives, by tokens", calls=passes, payload=passed_heads)
    yield context("gradients of both", calls=2 * layers, payload=4 * heads)
    whole, part, passed_part = width * c, -(-width // tp) * c, -(-passed * network.hidden_size // tp) * c
    per_layer = partial(tensor, calls=layers)
    if not network.sequence_parallel:
        yield per_layer("sums of W_o", "all_reduce", payload=whole)
        yield per_layer("gradients of W_uvqk's input", "all_reduce", payload=whole, behind="weights")
        return
    yield tensor("tokens before W_uvqk", "all_gather", calls=passes, payload=passed_part)
    yield per_layer("tokens before W_uvqk, again", "all_gather", payload=part, behind="weights")
    yield per_layer("sums of W_o", "reduce_scatter", payload=whole)
    yield per_layer("gradients of W_o's sums", "all_gather", payload=part)
    yield per_layer("gradients of W_uvqk's input", "reduce_scatter", payload=whole, behind="weights")


def _ends(workload: Workload, batch: Batch) -> Iterator[Transfer]:
    """Where layers begin and end, and where the head does."""
    network, task = workload.config.network, workload.config.task_args
    parts = [workload.share(workload.tokens(stage)) for stage in workload.stages(batch)]
    context = partial(Transfer, kind="all_gather", group="context", ranks=workload.cp_size)
    if network.sequence_parallel:
        numbers = sum(-(-part // workload.tp_size) for part in parts) * network.hidden_size
        name, calls, both = "tokens before and after the layers", 2 * len(parts), 2 * numbers * FLOAT32
        yield Transfer(name, "all_gather", "tensor", workload.tp_size, calls, both)
    for part in parts[1:]:  # to equal shares of what a truncation leaves and back, and so do the gradients
        yield context("tokens of a truncation", calls=4, payload=4 * part * network.hidden_size * FLOAT32)
    if isinstance(task, RankingArgs):
        outputs = task.prediction_head_arch[-1] if task.tasks is None else sum(t.output_width for t in task.tasks)
        yield context("what the head gives", calls=1, payload=workload.share(batch.labels) * outputs * FLOAT32)


def _pool(workload: Workload, batch: Batch) -> Iterator[Transfer]:
    """The in-batch pool of all data-parallel ranks."""
    ranks = workload.dp_size
    if rows := workload.batch_pool(batch.items):
        payload = rows * workload.config.network.item_width * FLOAT32
        yield Transfer("pool of negatives", "all_gather", "data", ranks, 2, payload + rows * INT64)
        yield Transfer("gradients of the pool", "reduce_scatter", "data", ranks, 1, payload * ranks)


def _gradients(workload: Workload, batch: Batch) -> Iterator[Transfer]:
    """Weights and their gradients, the rows of replicated tables on a CPU, and the few numbers of the loss."""
    elements = sum(workload.dense_parameters.values())
    if workload.device_type != "cpu":
        elements += workload.replicated_elements
    elif tables := [spec for spec in workload.specs if spec.replicated]:
        counts = workload.ids_per_rank(batch)
        looked_up = [sum(counts.get(name, 0) for name in spec.features) * workload.group_size for spec in tables]
        rows = [min(spec.rows, count) for spec, count in zip(tables, looked_up, strict=True)]
        payload = sum(count * (spec.dim * FLOAT32 + INT64) for spec, count in zip(tables, rows, strict=True))
        yield Transfer("rows of replicated tables", "all_gather", "data", workload.dp_cp_size, 2 * len(tables), payload)
    size = FLOAT32 if workload.config.precision.fp32_master_grads else workload.element_size
    data = partial(Transfer, group="data", ranks=workload.dp_cp_size)
    if workload.dense_sharding == "weights":
        yield from _sharded_weights(workload, size)
        elements -= sum(workload.dense_parameters.values())
    if workload.dense_sharding == "optimizer":
        ranks = workload.shard_group_size
        part = sum(held_weights(workload).values()) // ranks
        yield Transfer("updated dense weights", "all_gather", "shards", ranks, calls=1, payload=part * FLOAT32)
    if elements > 0:
        buckets = 1 + elements * FLOAT32 // DDP_BUCKET_BYTES
        payload = elements * size
        yield data("gradients of the dense part", "all_reduce", calls=buckets, payload=payload, behind="backward")
    yield data("loss and count", "all_reduce", ranks=workload.dp_size, calls=1, payload=2 * FLOAT32)


def _sharded_weights(workload: Workload, gradient_size: int) -> Iterator[Transfer]:
    """FSDP's units are the layers and all the rest; backward gathers the layers again if they were freed."""
    layers, passes = workload.config.network.num_layers, workload.config.trainer.gradient_accumulation_steps
    held = held_weights(workload)
    part, of_layer = sum(held.values()), sum(count for name, count in held.items() if name.startswith(FIRST_LAYER))
    ranks = workload.shard_group_size
    shards = partial(Transfer, group="shards", ranks=ranks)
    payload = passes * part * FLOAT32
    yield shards("dense weights in forward", "all_gather", calls=passes * (layers + 1), payload=payload)
    if workload.config.data_parallel.reshard_after_forward:
        payload = passes * layers * of_layer * FLOAT32
        yield shards("dense weights in backward", "all_gather", calls=passes * layers, payload=payload)
    gradients, payload = partial(Transfer, calls=layers + 1, behind="backward"), part * gradient_size
    yield gradients("gradients of the dense part", "reduce_scatter", "shards", ranks, payload=ranks * payload)
    replicas = workload.dp_cp_size // ranks
    yield gradients("their parts, between groups", "all_reduce", "replicas", replicas, payload=payload)
