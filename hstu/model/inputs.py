"""From table rows, numbers and vectors to the token sequence that the HSTU stack processes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import NetworkArgs, RankingArgs
from hstu.config.args.network import SIDE_WIDTH
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import NEGATIVES, POOL, HSTUBatch
from hstu.data.batches.jagged import sequence_tokens
from hstu.data.features.roles import FeatureRoles
from hstu.data.features.values import NUM_QUANTILES
from hstu.data.store.layout import NumberStatistics
from hstu.model.factors import OnlineFactors, Told
from hstu.model.heads import MLP
from hstu.ops.comm import LayerComm
from hstu.ops.dropout import dropout
from hstu.ops.kernels import Kernels
from hstu.ops.layout import JaggedLayout, build_layout, part_rows, to_device, token_order
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

_LEAST_STD = 1e-30


@dataclass(frozen=True)
class SequenceFeatures(FeatureRoles):
    """The features that form a sequence, and the maximum length of a sequence."""

    max_items: int = field(kw_only=True)
    """Items of the longest sequence, candidates included."""
    transforms: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Number or vector → NumericFeatureArgs.transform, if set."""
    classes: range = field(default=range(0), kw_only=True)
    """Numbers of the action that a ranking model predicts as classes; empty if it does not."""
    asks_for_next: bool = field(default=True, kw_only=True)
    """Argument of build_layout; see DatasetArgs.query_time."""

    def columns(self, known_after: bool) -> dict[str, range]:
        """Number or vector → its columns in a batch. known_after: those known after the event, or those before it."""
        ends = np.cumsum(self.number_widths, dtype=int).tolist()
        places = zip(self.numbers, self.number_widths, ends, strict=True)
        return {
            name: range(end - width, end) for name, width, end in places if (name in self.known_after) == known_after
        }

    @classmethod
    def of(cls, config: RunConfig, roles: FeatureRoles, first_class: int = 0) -> Self:
        """The sequences of a run whose data has these roles. first_class: the action that stands for class 0."""
        args = config.task_args
        number = args.num_classes if isinstance(args, RankingArgs) else 0
        return cls(
            **vars(roles),
            max_items=config.max_items,
            transforms={name: args.transform for args in config.numbers for name in args.feature_names},
            classes=range(first_class, first_class + number),
            asks_for_next=config.asks_for_next,
        )

    def tokens_per_item(self, network: NetworkArgs) -> int:
        """Tokens per item."""
        return network.tokens_per_item(self.action is not None)

    def max_tokens(self, network: NetworkArgs) -> int:
        """Tokens of the longest possible sequence."""
        items = np.array([self.max_items])
        return int(sequence_tokens(items, len(self.contextual), self.tokens_per_item(network))[0])


class SequenceInputs(nn.Module):
    """Table rows → tokens: scale by √D, project to width D if needed, interleave, add positions, apply dropout.

    Contextual features come first, one token each. Items follow, each with its action as the next token, or with its
    action added (``interleave_actions = False``; not for candidates, whose action is the label). Side features, rows
    and numbers, are joined, projected and added to the item token, or to the action token if known only after the
    event. Lists are averaged. Initial values: position rows N(0, 1/D), projections as in :class:`hstu.model.heads.MLP`.
    """

    def __init__(self, network: NetworkArgs, features: SequenceFeatures, kernels: Kernels = REFERENCE_KERNELS) -> None:
        super().__init__()
        hidden = network.hidden_size
        self.features = features
        self.tokens_per_item = features.tokens_per_item(network)
        self.target_group_size = network.target_group_size
        self.needs_times = network.needs_times
        self.dropout = network.hidden_dropout if network.input_dropout is None else network.input_dropout
        self.scale = math.sqrt(hidden)
        self.kernels = kernels

        self.side = {
            "side": [name for name in features.categories if name not in features.known_after],
            "known_after": [name for name in features.known_after if name in features.categories],
        }
        columns = {role: features.columns(known_after=role == "known_after") for role in self.side}
        numbers = {role: NumberInputs(found, features.transforms) for role, found in columns.items() if found}
        self.numbers = nn.ModuleDict(numbers)
        widths = {"item": network.item_width}
        if features.action is not None:
            widths["action"] = network.item_width
        if features.contextual:
            widths["contextual"] = network.contextual_width
        widths = {role: width for role, width in widths.items() if width != hidden}
        for role, names in self.side.items():
            if width := len(names) * SIDE_WIDTH + (numbers[role].out_width if role in numbers else 0):
                widths[role] = width
        self.projections = nn.ModuleDict({role: MLP(width, (hidden, hidden), "silu") for role, width in widths.items()})
        self.factors: OnlineFactors | None = None
        if network.num_factors:
            self.factors = OnlineFactors(hidden, network.num_factors, features.classes)
        self.position_table: nn.Parameter | None = None
        if "absolute" in network.position_encoding:
            self.position_table = nn.Parameter(torch.randn(network.num_position_buckets, hidden) / self.scale)

    def load_statistics(self, statistics: Mapping[str, NumberStatistics]) -> None:
        """Set the statistics of the training data by which numbers are transformed."""
        for numbers in self.numbers.values():
            cast(NumberInputs, numbers).load_statistics(statistics)

    def forward(
        self, embeddings: Mapping[str, Tensor], batch: HSTUBatch, comm: LayerComm | None = None
    ) -> tuple[Tensor, JaggedLayout]:
        """Returns this rank's tokens [., D] and the layout of all tokens. ``embeddings``: rows of every feature."""
        layout, comm = self.layout(batch), comm or LayerComm()
        own = comm.token_ranges(layout.num_tokens)[comm.cp_rank]
        x = self.kernels.jagged_concat(self.parts(embeddings, batch, layout, own), token_order(layout, own))
        if self.position_table is not None:
            x = self.kernels.add_positions(x, self.position_table, layout.positions[own.start : own.stop])
        return dropout(x, self.dropout, self.training, comm.input_stream), layout

    def layout(self, batch: HSTUBatch) -> JaggedLayout:
        """Layout of a batch's tokens. Raises ConfigError if the model needs times and the batch has none."""
        if self.needs_times and batch.items.timestamps is None:
            raise ConfigError(
                'NetworkArgs.position_encoding = "relative_bias" needs the time of every event, and this data '
                'has none; use "absolute" or "none"'
            )
        return build_layout(
            item_lengths=batch.item_lengths,
            num_sequences=batch.real_batch_size,
            num_contextuals=len(self.features.contextual),
            num_candidates=batch.num_candidates_host,
            tokens_per_item=self.tokens_per_item,
            target_group_size=self.target_group_size,
            device=batch.num_candidates.device,
            item_times=batch.items.timestamps if self.needs_times else None,
            asks_for_next=self.features.asks_for_next if batch.asks_for_next is None else batch.asks_for_next,
            request_times=batch.request_times if self.needs_times else None,
        )

    def parts(
        self, embeddings: Mapping[str, Tensor], batch: HSTUBatch, layout: JaggedLayout, tokens: range | None = None
    ) -> list[Tensor]:
        """Rows of width D of a token range, without positions, in :func:`hstu.ops.layout.token_order`'s order."""
        tokens = range(layout.num_tokens) if tokens is None else tokens
        *of_contexts, of_items = (rows := part_rows(layout, tokens))[: len(self.features.contextual) + 1]
        parts = [
            self._embed("contextual", feature, embeddings, batch.real_batch_size, own)
            for feature, own in zip(self.features.contextual, of_contexts, strict=True)
        ]
        of_actions = rows[-1]
        own = range(of_actions.start, of_items.stop)  # a range may begin with an action and end with an item
        num_items = int(batch.item_lengths.sum())
        read = own if self.factors is None else range(num_items)
        items, actions = self._embed("item", self.features.item, embeddings, num_items, read), None
        if self.features.action is not None:
            actions = self._embed("action", self.features.action, embeddings, num_items, read)
        side = {role: self._embed_side(role, embeddings, batch, read) for role in self.side if role in self.projections}
        if self.factors is not None and self.features.action is not None and actions is not None:
            classes, candidates = batch.features[self.features.action].values(), batch.num_candidates_host
            told = Told.in_batch(classes, _is_history(batch), batch.item_lengths, candidates)
            items, actions = (_rows(rows, own) for rows in self.with_factors(items, actions, side, told))
            side = {role: _rows(rows, own) for role, rows in side.items()}
        if self.tokens_per_item == 2:
            items, actions = self.combined(items, actions, side)
            ends = len(own) - len(of_items), len(of_actions)
            return [*parts, _rows(items, range(ends[0], len(own))), _rows(actions, range(ends[1]))]
        if layout.num_candidate_tokens is None or actions is None:
            return [*parts, *self.combined(items, actions, side)]
        return [*parts, *self.combined(items, actions, side, _rows(_is_history(batch), own))]

    def with_factors(
        self, items: Tensor, actions: Tensor, side: Mapping[str, Tensor], told: Told
    ) -> tuple[Tensor, Tensor]:
        """The projected rows of all items and of their actions, with what ``factors`` adds to them."""
        assert self.factors is not None
        of_items, of_actions = self.factors(items + side["side"] if "side" in side else items, told)
        return items + of_items, actions + of_actions

    def combined(
        self, items: Tensor, actions: Tensor | None, side: Mapping[str, Tensor], is_history: Tensor | None = None
    ) -> list[Tensor]:
        """Rows of item tokens and of action tokens, or of tokens that are both, from projected rows [n, D].

        ``side``: role → projected side features. ``is_history``: [n], 0 for candidates, whose actions are hidden.
        """
        if "side" in side:
            items = items + side["side"]
        events = items if actions is None else actions
        if "known_after" in side:
            events = events + side["known_after"]
        if self.tokens_per_item == 2:
            return [items, events]
        if actions is None:
            return [events]
        return [items + (events if is_history is None else events * is_history[:, None])]

    def project(self, role: str, rows: Tensor) -> Tensor:
        """Table rows of a role, scaled and projected to width D."""
        rows = rows * self.scale
        return self.projections[role](rows) if role in self.projections else rows

    def project_side(self, role: str, rows: Tensor | None, numbers: Tensor | None) -> Tensor:
        """Side features of one role, projected to width D, from their joined rows and the numbers of a batch."""
        found = [] if rows is None else [rows * self.scale]
        if role in self.numbers:
            transformed = self.numbers[role](numbers)
            found.append(transformed.to(found[0].dtype) if found else transformed)
        return self.projections[role](torch.cat(found, dim=1))

    def _embed(self, role: str, feature: str, embeddings: Mapping[str, Tensor], num_rows: int, own: range) -> Tensor:
        """Rows ``own`` of a feature, projected to width D. Raises DataError unless it has ``num_rows`` rows."""
        values = embeddings[feature]
        if len(values) != num_rows:
            raise DataError(
                f"feature {feature!r} has {len(values)} values in a batch that needs {num_rows}: a contextual feature "
                "has exactly one value per sequence, an action exactly one per item"
            )
        return self.project(role, _rows(values, own))

    def _embed_side(self, role: str, embeddings: Mapping[str, Tensor], batch: HSTUBatch, own: range) -> Tensor:
        """Side features of one role for the items ``own``, projected to width D."""
        joined, numbers, lengths = None, batch.items.numbers, batch.items.list_lengths
        if names := self.side[role]:
            of_lists = {} if lengths is None else dict(zip(self.features.lists, lengths, strict=True))
            joined = _rows(join_rows(names, embeddings, of_lists), own)
        return self.project_side(role, joined, None if numbers is None else _rows(numbers, own))


def _is_history(batch: HSTUBatch) -> Tensor:
    """bool [items], False for candidates."""
    kinds = np.stack([batch.item_lengths - batch.num_candidates_host, batch.num_candidates_host], axis=1)
    flags = np.repeat(np.tile([True, False], len(kinds)), kinds.reshape(-1))
    return to_device(flags, batch.num_candidates.device)


def _rows(values: Tensor, own: range) -> Tensor:
    """Slice the rows ``own``. All rows stay unsliced, because the backward of a slice copies the gradient."""
    return values if len(own) == len(values) else values[own.start : own.stop]


class NumberInputs(nn.Module):
    """ItemColumns.numbers → float32 [n, W + N]: W transformed values, then N flags that are 1 where one is missing.

    Each of the N numbers and vectors has its NumericFeatureArgs.transform, "standardize" by default. A missing one
    becomes 0. The statistics are buffers, so checkpoints contain the training data's statistics. Until
    ``load_statistics`` or a checkpoint sets them, the mean is 0 and the standard deviation 1.

    columns: number or vector → its columns in a batch.
    """

    columns: Tensor
    first: Tensor
    is_log: Tensor
    of_quantiles: Tensor
    shift: Tensor
    scale: Tensor
    quantiles: Tensor

    def __init__(self, columns: Mapping[str, range], transforms: Mapping[str, str]) -> None:
        super().__init__()
        self.transforms = {name: transforms.get(name, "standardize") for name in columns}
        widths = [len(places) for places in columns.values()]
        self.out_width = sum(widths) + len(widths)
        ends = np.cumsum(widths, dtype=int).tolist()
        self._places = {name: range(end - width, end) for name, width, end in zip(columns, widths, ends, strict=True)}
        kind = [self.transforms[name] for name, width in zip(columns, widths, strict=True) for _ in range(width)]
        self._has_logs = "log1p" in kind
        ranked = [place for place, transform in enumerate(kind) if transform == "quantile"]
        fixed = {
            "columns": torch.tensor([place for places in columns.values() for place in places]),
            "first": torch.tensor([places[0] for places in self._places.values()]),
            "is_log": torch.tensor([transform == "log1p" for transform in kind]),
            "of_quantiles": torch.tensor(ranked, dtype=torch.int64),
        }
        for name, values in fixed.items():
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("shift", torch.zeros(sum(widths)))
        self.register_buffer("scale", torch.ones(sum(widths)))
        if ranked:
            self.register_buffer("quantiles", torch.linspace(-1, 1, NUM_QUANTILES).repeat(len(ranked), 1))

    @torch.no_grad()
    def load_statistics(self, statistics: Mapping[str, NumberStatistics]) -> None:
        """Set the statistics of the training data: number or vector → statistics."""
        row = 0
        for name, places in self._places.items():
            found, transform = statistics[name], self.transforms[name]
            here = slice(places.start, places.stop)
            if transform == "standardize":
                self._set(here, found.mean, found.std)
            elif transform == "log1p":
                assert found.log_mean is not None and found.log_std is not None, "check_numbers refuses vectors"
                self._set(here, [found.log_mean], [found.log_std])
            elif transform == "quantile":
                assert found.quantiles is not None, "check_numbers refuses vectors"
                self.quantiles[row] = torch.tensor(found.quantiles)
                row += 1

    def _set(self, places: slice, mean: Sequence[float], std: Sequence[float]) -> None:
        self.shift[places] = torch.tensor(mean)
        self.scale[places] = torch.tensor([1 / each if each > _LEAST_STD else 1.0 for each in std])

    def forward(self, numbers: Tensor) -> Tensor:
        """``numbers``: float32 [n, columns of a batch], NaN where missing."""
        values = numbers.index_select(1, self.columns).to(self.shift.dtype)
        missing = values.isnan()
        known = values.masked_fill(missing, 0)
        if self._has_logs:
            known = torch.where(self.is_log, known.sign() * known.abs().log1p(), known)
        transformed = (known - self.shift) * self.scale
        if len(self.of_quantiles):
            ranks = rank_among(known.index_select(1, self.of_quantiles).t().contiguous(), self.quantiles)
            transformed = transformed.index_copy(1, self.of_quantiles, ranks.t())
        flags = missing.index_select(1, self.first).to(transformed.dtype)
        return torch.cat([transformed.masked_fill(missing, 0), flags], dim=1)


def rank_among(values: Tensor, quantiles: Tensor) -> Tensor:
    """Fraction of values below each value, scaled to [-1, 1]; linear between quantiles, the middle of equal ones.

    values: [k, n]. quantiles: [k, Q], ascending, at equal steps of probability.
    """
    last = quantiles.shape[1] - 1
    left = torch.searchsorted(quantiles, values)
    right = torch.searchsorted(quantiles, values, right=True)
    below = quantiles.gather(1, (left - 1).clamp(0, last))
    above = quantiles.gather(1, left.clamp(0, last))
    # Nonzero for values strictly between two quantiles. Halving before subtracting avoids overflow.
    part = (values / 2 - below / 2) / (above / 2 - below / 2)
    between = torch.where(above > below, part, torch.zeros_like(part))
    place = torch.where(right > left, (left + right - 1) / 2, left - 1 + between)
    return place.clamp(0, last) * (2 / last) - 1


def join_rows(names: Sequence[str], rows: Mapping[str, Tensor], list_lengths: Mapping[str, Tensor]) -> Tensor:
    """Join the feature rows of n items side by side: [n, number of names × width]. Lists are averaged.

    rows: feature → [n, width], or for a list [sum of list_lengths, width]. list_lengths: list → int64 [n].
    """
    joined = []
    for name in names:
        values = rows[name]
        if name in list_lengths:
            lengths = list_lengths[name]
            values = torch.segment_reduce(values, "mean", lengths=lengths, unsafe=True)  # checks would wait for the GPU
        joined.append(values)
    return torch.cat(joined, dim=1)


class ItemTower(nn.Module):
    """Vector of an item: the row of its id plus an MLP of its joined feature rows. Both are scaled by √E."""

    def __init__(self, network: NetworkArgs, roles: FeatureRoles) -> None:
        super().__init__()
        self.features, self.lists, self._all_lists = roles.tower, roles.tower_lists, roles.lists
        width = network.item_width
        self.scale = math.sqrt(width)
        self.projection = MLP(len(self.features) * SIDE_WIDTH, (width, width), "silu")

    def forward(self, rows: Tensor, of_features: Mapping[str, Tensor], list_lengths: Mapping[str, Tensor]) -> Tensor:
        """Vectors [n, E], not normalised. rows: of the ids, [n, E]; the rest as in :func:`join_rows`."""
        joined = join_rows(self.features, of_features, list_lengths)
        return rows * self.scale + self.projection(joined * self.scale)

    def list_lengths(self, batch: HSTUBatch, key: str) -> dict[str, Tensor]:
        """List → number of values for each item under ``key``: the item feature, NEGATIVES or POOL."""
        if key == POOL:
            assert batch.negatives.pool_features is not None
            return {name: batch.negatives.pool_features[name].lengths() for name in self.lists}
        is_negative = key == NEGATIVES
        lengths = batch.negatives.list_lengths if is_negative else batch.items.list_lengths
        names = self.lists if is_negative else self._all_lists
        return {} if lengths is None else {name: lengths[names.index(name)] for name in self.lists}
