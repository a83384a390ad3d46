"""What a training step exchanges: each collective with the bytes that one rank hands to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hstu.config.args import RetrievalArgs
from hstu.data.batch import NEGATIVES
from hstu.train.estimate.activations import ID
from hstu.train.estimate.parameters import LAYERS, NUMBER, TableShards, dense_parameters, replicated_elements
from hstu.train.estimate.situation import Batch, Situation

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Group = Literal["world", "data", "tensor"]
Cover = Literal["backward", "weights", "pipeline", "nothing"]


@dataclass(frozen=True)
class Transfer:
    """Collectives of one purpose in a step."""

    name: str
    kind: Kind
    group: Group
    ranks: int
    """Size of the group."""
    calls: int
    payload: int
    """Bytes of this rank's inputs to all calls together; of the busiest rank where ranks differ."""
    behind: Cover = "nothing"
    """What it can hide behind: all of backward, a layer's product for its weight's gradient, the steps before (as the
    pipeline allows), nothing."""

    @property
    def wire(self) -> float:
        """Bytes that a rank must send at least: of a ring for all_reduce, all but its own part for the others."""
        others = self.ranks - 1
        factor = {"all_reduce": 2 * others / self.ranks, "all_gather": others}.get(self.kind, others / self.ranks)
        return self.payload * factor


def transfers(situation: Situation, batch: Batch, plan: tuple[TableShards, ...]) -> tuple[Transfer, ...]:
    """Everything that a step on ``batch`` exchanges; of groups of one rank nothing."""
    found = [
        *_tables(situation, batch, plan),
        *_gathered_rows(situation, batch),
        *_layers(situation, batch),
        *_pool(situation, batch),
        *_gradients(situation),
    ]
    return tuple(transfer for transfer in found if transfer.ranks > 1)


def _tables(situation: Situation, batch: Batch, plan: tuple[TableShards, ...]) -> Iterator[Transfer]:
    """TorchRec: ids to the ranks that have their rows, the rows back, and their gradients there again.

    One exchange a collection (tables of one width) and kind of sharding.
    """
    ranks, own = situation.world_size, situation.own_ids(batch)
    sequences = situation.config.trainer.sequences_per_iteration
    exchanges = {(table.spec.stored_dim, table.sharding) for table in plan}
    ids, lengths = 0, 0
    rows = np.zeros(ranks)
    for table in plan:
        count = sum(own.get(feature, 0) for feature in table.spec.features)
        by_rows = table.sharding == "row_wise"
        copies = 1 if by_rows else len(table.shards)
        ids += count * copies * ID
        lengths += len(table.spec.features) * sequences * (ranks if by_rows else copies) * ID
        for rank, _, columns in table.shards:  # each row goes to the rank that asked for it
            rows[rank] += count * columns * NUMBER * (1 if by_rows else ranks)
    calls = len(exchanges)
    asked = sum(sum(own.get(feature, 0) for feature in t.spec.features) * t.spec.stored_dim for t in plan) * NUMBER
    yield Transfer("ids to their tables", "all_to_all", "world", ranks, 3 * calls, ids + lengths, "pipeline")
    yield Transfer("rows of the tables", "all_to_all", "world", ranks, calls, int(rows.max()))
    yield Transfer("gradients of the rows", "all_to_all", "world", ranks, calls, asked)


def _gathered_rows(situation: Situation, batch: Batch) -> Iterator[Transfer]:
    """Tensor parallelism: looked-up rows of the group's samples, one collective a width."""
    own, tp = situation.own_ids(batch), situation.tp_size
    args = situation.config.task_args
    shared = isinstance(args, RetrievalArgs) and (args.shared_negatives or args.negatives == "full")
    dims = {
        feature: spec.dim
        for spec in situation.specs
        for feature in spec.features
        if not spec.replicated and not (feature == NEGATIVES and shared)
    }
    payload = sum(own.get(feature, 0) * dim for feature, dim in dims.items()) * NUMBER
    calls = len(set(dims.values()))
    yield Transfer("samples of the group, on hosts", "all_gather", "tensor", tp, 2, _host_batch_bytes(situation, batch))
    yield Transfer("rows of the group's samples", "all_gather", "tensor", tp, calls, payload)
    yield Transfer("their gradients", "reduce_scatter", "tensor", tp, calls, payload * tp)


def _host_batch_bytes(situation: Situation, batch: Batch) -> int:
    """A rank's batch, pickled."""
    own, args = situation.own_ids(batch), situation.config.task_args
    labels = -(-batch.labels // situation.tp_size)
    draws = max(getattr(args, "num_negatives", 0), 0) if not getattr(args, "shared_negatives", False) else 0
    sequences = situation.config.trainer.sequences_per_iteration * (len(own) + 4)
    return ID * (sum(own.values()) + labels + sequences) + NUMBER * labels * draws


def _layers(situation: Situation, batch: Batch) -> Iterator[Transfer]:
    """Tensor parallelism within the layers (parallel/tensor.py)."""
    network, tp, c = situation.config.network, situation.tp_size, situation.compute_bytes
    layers, tokens = network.num_layers, situation.tokens(batch)
    again = 2 if network.recompute_layer else 1  # what W_o's input takes runs once more in backward
    width = tokens * network.hidden_size
    norms = layers * 2 * tokens * NUMBER
    yield Transfer(
        "statistics of the output norm", "all_gather", "tensor", tp, layers * (1 + again), norms * (1 + again)
    )
    parameters = dense_parameters(situation)
    names = [
        "bias.position_weight",
        "bias.time_weight",
        *(["input_norm.weight"] * 2 if network.sequence_parallel else []),
    ]
    shared = [parameters.get(f"{LAYERS}.0.{name}", 0) for name in names]  # the norm's bias is as large as its weight
    calls = layers * sum(count > 0 for count in shared)
    payload = layers * sum(shared) * NUMBER
    yield Transfer("gradients of what is shared", "all_reduce", "tensor", tp if calls else 1, calls, payload)
    if not network.sequence_parallel:
        yield Transfer("sums of W_o", "all_reduce", "tensor", tp, layers, layers * width * c)
        yield Transfer("gradients of W_uvqk's input", "all_reduce", "tensor", tp, layers, layers * width * c, "weights")
        return
    part = -(-width // tp)
    yield Transfer("tokens before W_uvqk", "all_gather", "tensor", tp, layers * again, layers * again * part * c)
    yield Transfer("tokens before W_uvqk, again", "all_gather", "tensor", tp, layers, layers * part * c, "weights")
    yield Transfer("sums of W_o", "reduce_scatter", "tensor", tp, layers, layers * width * c)
    yield Transfer("gradients of W_o's sums", "all_gather", "tensor", tp, layers, layers * part * c)
    yield Transfer("gradients of W_uvqk's input", "reduce_scatter", "tensor", tp, layers, layers * width * c, "weights")
    yield Transfer("tokens before and after the layers", "all_gather", "tensor", tp, 2, 2 * part * NUMBER)


def _pool(situation: Situation, batch: Batch) -> Iterator[Transfer]:
    """The in-batch pool of all data-parallel ranks."""
    args = situation.config.task_args
    if not isinstance(args, RetrievalArgs) or args.negatives != "in_batch":
        return
    rows = situation.pool(batch)
    payload = rows * situation.config.network.item_width * NUMBER
    ranks = situation.dp_size
    yield Transfer("pool of negatives", "all_gather", "data", ranks, 2, payload + rows * ID)
    yield Transfer("gradients of the pool", "reduce_scatter", "data", ranks, 1, payload * ranks)


def _gradients(situation: Situation) -> Iterator[Transfer]:
    """DDP's buckets, and the few numbers of the loss."""
    elements = sum(dense_parameters(situation).values()) + replicated_elements(situation)
    buckets = 1 + elements * NUMBER // DDP_BUCKET_BYTES
    ranks, width = situation.dp_size, NUMBER
    if not situation.config.precision.fp32_master_grads:
        width = situation.compute_bytes
    yield Transfer("gradients of the dense part", "all_reduce", "data", ranks, buckets, elements * width, "backward")
    yield Transfer("loss and count", "all_reduce", "data", ranks, 1, 2 * NUMBER)


DDP_BUCKET_BYTES = 25 << 20
"""torch's default for bucket_cap_mb."""
