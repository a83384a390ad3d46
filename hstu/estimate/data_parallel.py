"""What data parallelism adds to a step, and how it shares weights and states: DDP, FSDP2, sharded optimizer states.

DDP's reducer and FSDP2 wrap the model from outside, and do not run without data; the weights tell what they need.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hstu.estimate.dry_run import DryRun
from hstu.estimate.transfer import Transfer
from hstu.estimate.workload import Workload
from hstu.ops.costs import FLOAT32
from hstu.parallel.flat_weights import FlatLayout

DDP_BUCKET_BYTES = 25 << 20
"""torch's default for bucket_cap_mb."""


def held_weights(workload: Workload, run: DryRun) -> dict[str, int]:
    """Elements of each parameter of the dense part that a rank holds from step to step, padding included."""
    counts, ranks = {name: weight.elements for name, weight in run.weights.items()}, workload.shard_group_size
    match workload.dense_sharding:
        case "weights":
            return {name: -(-w.rows // ranks) * (w.elements // w.rows) for name, w in run.weights.items()}
        case "optimizer":
            return counts | {"padding": ranks * FlatLayout.of(counts, ranks).range_size - sum(counts.values())}
    return counts


def state_bytes(workload: Workload, run: DryRun) -> int:
    """States of the dense optimizers and the moving average, on the rank with the most."""
    counts, ranks = {name: weight.elements for name, weight in run.weights.items()}, workload.shard_group_size
    shares = [held_weights(workload, run)]  # with sharded weights, the first rank's, without padding
    if workload.dense_sharding == "optimizer":
        by_rank = map(FlatLayout.of(counts, ranks).owned, range(ranks))
        shares = [{name: len(elements) for name, elements in owned.items()} for owned in by_rank]

    def of_share(share: dict[str, int]) -> int:
        owned = [(run.weights[name], count) for name, count in share.items()]
        return sum(weight.state_bytes * count // weight.elements + weight.step_bytes for weight, count in owned)

    return max(map(of_share, shares))


def gathered_and_gradients(workload: Workload, run: DryRun) -> tuple[int, int]:
    """Elements of gathered weights, and of all gradients, that a rank needs at the same time.

    FSDP gathers all weights but those of the layers, a layer, and the buffers of the exchanges that overlap with it.
    """
    config = workload.config
    dense = sum(weight.elements for weight in run.weights.values())
    if workload.dense_sharding != "weights":
        return 0, dense
    of_layers = sum(weight.elements for weight in run.weights.values() if weight.is_layer)
    layer, rest = of_layers // config.network.num_layers, dense - of_layers
    # Micro-batches are summed before they are exchanged.
    gradients = dense + layer if config.trainer.gradient_accumulation_steps > 1 else rest + 2 * layer
    return rest + 3 * layer, gradients + sum(held_weights(workload, run).values())


def data_parallel_transfers(workload: Workload, run: DryRun, replicated_elements: int) -> Iterator[Transfer]:
    """Weights and their gradients. ``replicated_elements``: of replicated tables whose gradients DDP exchanges."""
    elements = sum(weight.elements for weight in run.weights.values()) + replicated_elements
    size = FLOAT32 if workload.config.precision.fp32_master_grads or workload.element_size == FLOAT32 else 2
    ranks, held = workload.shard_group_size, sum(held_weights(workload, run).values())
    if workload.dense_sharding == "weights":
        yield from _sharded_weights(workload, run, size)
        elements = replicated_elements
    if workload.dense_sharding == "optimizer":
        payload = held // ranks * FLOAT32
        yield Transfer("updated dense weights", "all_gather", "shards", ranks, calls=1, payload=payload)
    if elements > 0:
        buckets, group = 1 + elements * FLOAT32 // DDP_BUCKET_BYTES, workload.dp_cp_size
        name = "gradients of the dense part"
        yield Transfer(name, "all_reduce", "data", group, buckets, elements * size, behind="backward")


def _sharded_weights(workload: Workload, run: DryRun, gradient_size: int) -> Iterator[Transfer]:
    """FSDP's units are the layers and all the rest; backward gathers the layers again."""
    layers, passes = workload.config.network.num_layers, workload.config.trainer.gradient_accumulation_steps
    held, ranks = held_weights(workload, run), workload.shard_group_size
    part, of_layers = sum(held.values()), sum(n for name, n in held.items() if run.weights[name].is_layer)
    shards = partial(Transfer, group="shards", ranks=ranks)
    payload = passes * part * FLOAT32
    yield shards("dense weights in forward", "all_gather", calls=passes * (layers + 1), payload=payload)
    payload = passes * of_layers * FLOAT32
    yield shards("dense weights in backward", "all_gather", calls=passes * layers, payload=payload)
    name, payload = "gradients of the dense part", ranks * part * gradient_size
    yield shards(name, "reduce_scatter", calls=layers + 1, payload=payload, behind="backward")
