"""The operators of a training step, forward and backward, with what they compute and move.

An operator's ``flops`` are arithmetic on matrices, its ``moved`` bytes what it reads and writes if nothing stays in a
cache. machine.py turns both into seconds by roofline; calibration.py times the operators themselves on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from hstu.config.args import NetworkArgs, RankingArgs, RetrievalArgs
from hstu.observe.flops import sequence_flops
from hstu.parallel.table_training import TableTraining, is_of_rows
from hstu.train.estimate.parameters import (
    NUMBER,
    STATES_OF_DENSE,
    TableShards,
    projected_roles,
    trained_densely,
)
from hstu.train.estimate.situation import Batch, Situation


@dataclass(frozen=True, kw_only=True)
class Op:
    """``times`` alike operators; ``extra_forwards``: forwards that backward runs again, per operator."""

    name: str
    times: int = 1
    extra_forwards: int = 0

    @property
    def flops(self) -> float:
        """Of one forward and backward; none for what only moves bytes."""
        return 0.0

    @property
    def moved(self) -> float:
        """Bytes of one forward and backward."""
        raise NotImplementedError

    @property
    def launches(self) -> int:
        """Kernels of one forward and backward."""
        return 4


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """x [rows, inputs] → [rows, outputs] in a type of ``c`` bytes, parameters in float32."""

    rows: int
    inputs: int
    outputs: int
    c: int

    @property
    def flops(self) -> float:
        """One product forward, two backward."""
        return 6.0 * self.rows * self.inputs * self.outputs

    @property
    def moved(self) -> float:
        """Each of the three products reads two and writes one; the weight is cast where c is not 4."""
        weights = self.inputs * self.outputs
        cast = (NUMBER + self.c) * (weights + self.rows * self.inputs) if self.c != NUMBER else 0
        return 3.0 * self.c * (self.rows * (self.inputs + self.outputs) + weights) + cast


@dataclass(frozen=True, kw_only=True)
class Norm(Op):
    """LayerNorm of [rows, width] float32, its output in a type of ``c`` bytes."""

    rows: int
    width: int
    c: int

    @property
    def moved(self) -> float:
        """Forward 2, backward 3 passes, and the casts."""
        cast = 2 * (NUMBER + self.c) if self.c != NUMBER else 0
        return (5.0 * NUMBER + cast) * self.rows * self.width


@dataclass(frozen=True, kw_only=True)
class Silu(Op):
    """SiLU of [rows, heads · 4 · width], the U, V, Q and K."""

    rows: int
    heads: int
    width: int
    c: int

    @property
    def moved(self) -> float:
        """Forward 2, backward 3 passes."""
        return 5.0 * self.c * self.rows * self.heads * 4 * self.width


@dataclass(frozen=True, kw_only=True)
class Gate(Op):
    """Dropout(LayerNorm(attention) ⊙ U) of [rows, heads, width] (hstu/ops/norm_mul_dropout.py)."""

    ranks: int
    """Over which the heads of a row are cut."""
    rows: int
    heads: int
    width: int
    c: int
    dropout: float

    @property
    def moved(self) -> float:
        """Unfused: casts, norm, product, dropout; backward about as much again."""
        passes = 2 * (2 * (NUMBER + self.c) + 2 * NUMBER + (2 * NUMBER + self.c))
        dropped = 2 * (2 * self.c + 1) if self.dropout > 0 else 0
        return float(passes + dropped) * self.rows * self.heads * self.width

    @property
    def launches(self) -> int:
        """See Op."""
        return 14


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """The residual of [rows, width], to which something in a type of ``c`` bytes is added."""

    rows: int
    width: int
    c: int

    @property
    def moved(self) -> float:
        """Two in, one out; backward adds two gradients and casts one."""
        cast = NUMBER + self.c if self.c != NUMBER else 0
        return (4.0 * NUMBER + self.c + NUMBER + cast) * self.rows * self.width


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """One layer's attention over the sequences of ``batch`` (hstu/ops/attention.py), ``heads`` of them on a rank."""

    network: NetworkArgs = field(repr=False)
    batch: Batch = field(repr=False)
    num_contextuals: int
    tokens_per_item: int
    heads: int
    c: int

    @property
    def seqlens(self) -> np.ndarray:
        """Tokens of each sequence, int64."""
        return self.batch.item_lengths * self.tokens_per_item + self.num_contextuals

    @property
    def flops(self) -> float:
        """As hstu/observe/flops.py counts."""
        costs = sequence_flops(
            self.seqlens,
            self.batch.num_candidates * self.tokens_per_item,
            num_layers=1,
            hidden_size=0,
            num_heads=self.heads,
            head_dim=self.network.kv_channels,
            is_causal=self.network.is_causal,
        )
        return float(costs.sum())

    @property
    def moved(self) -> float:
        """q, k, v and the output forward; those, their gradients and the output's backward."""
        return 12.0 * self.c * int(self.seqlens.sum()) * self.heads * self.network.kv_channels


@dataclass(frozen=True, kw_only=True)
class Inputs(Op):
    """Tokens [rows, width] of looked-up rows: scale, permute, positions, dropout."""

    rows: int
    width: int
    dropout: float
    positions: int
    """Rows of the position table; 0: none."""

    @property
    def moved(self) -> float:
        """Scale 2, concatenate 2, permute 2, positions 3, dropout 2 passes, and backward the same."""
        passes = 6 + (3 if self.positions else 0) + (2 if self.dropout > 0 else 0)
        return 2.0 * NUMBER * passes * self.rows * self.width + NUMBER * 2 * self.positions * self.width

    @property
    def launches(self) -> int:
        """See Op."""
        return 24


@dataclass(frozen=True, kw_only=True)
class Lookup(Op):
    """``ids`` rows of a replicated table of ``rows``; its gradient is dense."""

    ids: int
    rows: int
    width: int

    @property
    def moved(self) -> float:
        """Rows read and written, gradients scattered into a table of zeros."""
        return NUMBER * self.width * (5.0 * self.ids + self.rows)


@dataclass(frozen=True, kw_only=True)
class ShardedLookup(Op):
    """The sharded tables of a rank: rows for what is asked of it, and their update."""

    situation: Situation = field(repr=False)
    plan: tuple[TableShards, ...] = field(repr=False)
    ids: dict[str, int]

    @property
    def moved(self) -> float:
        """Rows read and written; gradients written and read; rows and states read and written by the update."""
        moved = 0.0
        for table in self.plan:
            states = TableTraining.of(table.spec, self.situation.config.optimizer).states
            wide = sum(not is_of_rows(state) for state in states)
            elements = sum(self.ids.get(feature, 0) for feature in table.spec.features) * table.spec.stored_dim
            moved += NUMBER * float(elements) * (2 + 4 + 2 * (1 + wide))
        return moved

    @property
    def launches(self) -> int:
        """A few for every collection's ids, rows and gradients."""
        return 40 * len({table.spec.stored_dim for table in self.plan})


@dataclass(frozen=True, kw_only=True)
class SampledSoftmax(Op):
    """``queries`` against ``draws`` rows each of a pool (hstu/ops/softmax_loss.py); 0 draws: against all of it."""

    queries: int
    pool: int
    draws: int
    width: int

    @property
    def flops(self) -> float:
        """The whole pool: scores, and products for both gradients."""
        return 0.0 if self.draws else 6.0 * self.queries * self.pool * self.width

    @property
    def moved(self) -> float:
        """Draws: rows gathered three times. Whole pool: the scores, a few times."""
        if self.draws:
            return 3.0 * NUMBER * self.queries * self.draws * self.width
        return 6.0 * NUMBER * self.queries * self.pool

    @property
    def launches(self) -> int:
        """See Op."""
        return 40


@dataclass(frozen=True, kw_only=True)
class Classes(Op):
    """The loss of ``rows`` logits of ``width``, and the selection of their tokens of ``hidden``."""

    rows: int
    width: int
    hidden: int
    tokens: int

    @property
    def moved(self) -> float:
        """Selection and its scatter into zeros; the loss."""
        return NUMBER * (4.0 * self.rows * self.hidden + self.tokens * self.hidden + 6.0 * self.rows * self.width)

    @property
    def launches(self) -> int:
        """See Op."""
        return 20


@dataclass(frozen=True, kw_only=True)
class DenseUpdate(Op):
    """The dense optimizer on so many elements."""

    optimizer: str
    elements: int
    tensors: int

    @property
    def moved(self) -> float:
        """Weight and states read and written, gradient written and read."""
        return NUMBER * float(self.elements) * (2 + 2 * STATES_OF_DENSE[self.optimizer] + 2)


def operators(situation: Situation, batch: Batch, plan: tuple[TableShards, ...]) -> list[Op]:
    """What one rank of the group that trains on ``batch`` computes in a step."""
    return [
        *_inputs(situation, batch, plan),
        *_layers(situation, batch),
        *_task(situation, batch),
        *_updates(situation),
    ]


def _inputs(situation: Situation, batch: Batch, plan: tuple[TableShards, ...]) -> Iterator[Op]:
    network, features, c = situation.config.network, situation.features, situation.compute_bytes
    if plan:
        yield ShardedLookup(name="sharded tables", situation=situation, plan=plan, ids=situation.own_ids(batch))
    every = {name: count * situation.tp_size for name, count in situation.own_ids(batch).items()}
    for spec in situation.specs:
        if spec.replicated:
            ids = sum(every.get(feature, 0) for feature in spec.features)
            yield Lookup(name="replicated tables", ids=ids, rows=spec.rows, width=spec.dim)
    rows = {"item": batch.items, "action": batch.items, "contextual": batch.sequences * len(features.contextual)}
    for role, width in projected_roles(situation).items():
        for inputs in (width, network.hidden_size):
            yield Linear(name="projections", rows=rows[role], inputs=inputs, outputs=network.hidden_size, c=c)
    yield Inputs(
        name="tokens",
        rows=situation.tokens(batch),
        width=network.hidden_size,
        dropout=network.hidden_dropout if network.input_dropout is None else network.input_dropout,
        positions=network.num_position_buckets if network.position_encoding == "absolute" else 0,
    )


def _layers(situation: Situation, batch: Batch) -> Iterator[Op]:
    network, tp, c = situation.config.network, situation.tp_size, situation.compute_bytes
    hidden, heads, width = network.hidden_size, network.num_attention_heads // tp, network.kv_channels
    inner, tokens = heads * width, situation.tokens(batch)
    own = -(-tokens // tp) if network.sequence_parallel else tokens
    layers, whole = network.num_layers, int(network.recompute_layer)
    norm = max(whole, int(network.recompute_input_layernorm))
    silu = max(whole, int(network.recompute_input_silu))
    yield Norm(name="norm of the input", times=layers, extra_forwards=norm, rows=own, width=hidden, c=c)
    yield Linear(name="W_uvqk", times=layers, extra_forwards=whole, rows=tokens, inputs=hidden, outputs=4 * inner, c=c)
    yield Silu(name="SiLU", times=layers, extra_forwards=silu, rows=tokens, heads=heads, width=width, c=c)
    yield Attention(
        name="attention",
        times=layers,
        extra_forwards=whole,
        network=network,
        batch=batch,
        num_contextuals=len(situation.roles.contextual),
        tokens_per_item=situation.features.tokens_per_item(network),
        heads=heads,
        c=c,
    )
    yield Gate(
        name="norm, gate, dropout",
        ranks=tp,
        times=layers,
        extra_forwards=whole,
        rows=tokens,
        heads=heads,
        width=width,
        c=c,
        dropout=network.hidden_dropout,
    )
    yield Linear(name="W_o", times=layers, rows=tokens, inputs=inner, outputs=hidden, c=c)
    yield Add(name="residual", times=layers, rows=own, width=hidden, c=c)


def _task(situation: Situation, batch: Batch) -> Iterator[Op]:
    args, network, c = situation.config.task_args, situation.config.network, situation.compute_bytes
    hidden, tokens = network.hidden_size, situation.tokens(batch)
    if isinstance(args, RankingArgs):
        widths = [hidden, *args.prediction_head_arch]
        for inputs, outputs in pairwise(widths):
            yield Linear(name="head", rows=batch.labels, inputs=inputs, outputs=outputs, c=c)
        yield Classes(name="loss", rows=batch.labels, width=widths[-1], hidden=hidden, tokens=tokens)
        return
    assert isinstance(args, RetrievalArgs)
    width = network.item_width
    if width != hidden:
        yield Linear(name="queries", rows=batch.labels, inputs=hidden, outputs=width, c=NUMBER)
    # Queries and positives: selected and normalised.
    for rows in (tokens, batch.items):
        yield Classes(name="queries", rows=batch.labels, width=width, hidden=width, tokens=rows)
    pool = situation.pool(batch)
    pool *= situation.dp_size if args.negatives == "in_batch" else 1
    draws = 0 if args.shared_negatives else max(args.num_negatives, 0)
    yield SampledSoftmax(name="loss", queries=batch.labels, pool=pool, draws=draws, width=width)


def _updates(situation: Situation) -> Iterator[Op]:
    by_optimizer: dict[str, list[int]] = {}
    for optimizer, elements in trained_densely(situation):
        by_optimizer.setdefault(optimizer, []).append(elements)
    for optimizer, counts in by_optimizer.items():
        yield DenseUpdate(name="dense optimizer", optimizer=optimizer, elements=sum(counts), tensors=len(counts))
