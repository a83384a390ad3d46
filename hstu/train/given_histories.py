"""Histories that are given by hand, in the ids of the raw data, as batches of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hstu.base.errors import DataError
from hstu.base.ids import codes_of
from hstu.checkpoint.raw_ids import RawIds
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import PADDING_ID, HSTUBatch
from hstu.data.batches.collate import Assembler
from hstu.data.batches.jagged import ranges, run_offsets
from hstu.data.batches.rows import Rows
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.features.time_features import gap_codes, time_codes
from hstu.data.sampling.sampler import START, BatchPlan
from hstu.data.store.layout import TIME_FEATURES
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.train.batch_source import BatchSource
from hstu.train.store_source import StoreSource


@dataclass(frozen=True)
class History:
    """The events of one user, oldest first, in the ids of the raw data."""

    user: Any
    items: np.ndarray | Sequence[Any]
    """[n]: int64 or strings."""
    actions: np.ndarray | Sequence[Any] | None = None
    """int32 [n]; None: the data has no actions."""
    timestamps: np.ndarray | Sequence[int] | None = None
    """int64 [n], seconds since 1970; None: the data has no times."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Contextual feature → raw value of this user."""
    features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Feature of items or of events → its raw value at each of the n events, None where it is missing; a list of
    values where items have several, and for a vector. Features of items come from the data, where it is at hand, if
    they are left out."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one feature, in raw data and as a model gets them."""

    num_ids: int
    raw_ids: np.ndarray | None
    """Code → raw id, ascending: int64 or str objects. None: raw ids are the codes or, with ``keeps_raw``, any int64."""
    keeps_raw: bool

    @property
    def unknown(self) -> int:
        """What the model gets for an unknown id. Its row is zeros."""
        return PADDING_ID if self.keeps_raw else self.num_ids

    def encode(self, values: Iterable[Any]) -> np.ndarray:
        """What the model gets for raw values, int64 [n]; numbers may be given as strings."""
        if self.raw_ids is not None and self.raw_ids.dtype == object:
            wanted = np.array([str(value) for value in values], dtype=object)
            is_number = np.ones(len(wanted), dtype=bool)
        else:
            numbers = [_as_int64(value) for value in values]
            is_number = np.array([number is not None for number in numbers], dtype=bool)
            wanted = np.array([number or 0 for number in numbers], dtype=np.int64)
        if self.keeps_raw:
            return np.where(is_number, wanted, self.unknown)
        if self.raw_ids is None:
            codes, known = wanted, is_number & (wanted >= 0) & (wanted < self.num_ids)
        else:
            codes = codes_of(wanted, self.raw_ids)
            known = is_number & (codes >= 0)
        return np.where(known, codes, self.unknown).astype(np.int64)

    def decode(self, ids: np.ndarray) -> list[Any]:
        """Raw ids of what the model gets, which must be known."""
        decoded: list[Any] = (ids if self.raw_ids is None or self.keeps_raw else self.raw_ids[ids]).tolist()
        return decoded


def _as_int64(value: Any) -> int | None:
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if -(2**63) <= number < 2**63 else None


def vocabularies_of(source: BatchSource, raw_ids: RawIds) -> dict[str, Vocabulary]:
    """The vocabulary of each feature."""
    return {
        name: Vocabulary(source.cardinalities[name], raw_ids.decoded(name), name in source.raw_features)
        for name in source.roles.names
    }


class HistoryEncoder:
    """Turns histories given by hand into batches of the model of ``config``."""

    def __init__(self, config: RunConfig, source: BatchSource, vocabularies: Mapping[str, Vocabulary]) -> None:
        self._config, self._source, self._vocabularies = config, source, vocabularies
        self._store: SequenceStore | None = source.store if isinstance(source, StoreSource) else None
        self._of_times = [
            name for name in source.roles.side if name in TIME_FEATURES and vocabularies[name].raw_ids is None
        ]
        """Features that follow from the times of the events."""
        self.unknown: dict[str, set[Any]] = defaultdict(set)
        """Feature → raw values that the model does not have, of all histories so far."""

    def encode(self, feature: str, values: Sequence[Any]) -> np.ndarray:
        """What the model gets for raw values, int64 [n]. Notes those that are unknown."""
        vocabulary = self._vocabularies[feature]
        ids = vocabulary.encode(values)
        self.unknown[feature] |= {value for value, id_ in zip(values, ids, strict=True) if id_ == vocabulary.unknown}
        return ids

    def batches(
        self, histories: Sequence[History], *, max_items: Sequence[int] | None = None, num_candidates: int = 0
    ) -> Iterator[HSTUBatch]:
        """The histories in order, each cut to its newest items. Raises DataError for one that lacks something.

        Args:
            max_items: items that are kept of each history. None: as many as the model was trained on.
            num_candidates: the newest so many items of each history are the candidates of one request, which follows
                the event before them.
        """
        source, size = self._source, self._config.trainer.eval_batch_size
        # An evaluation batch, so that no negatives are drawn; its held-out items mean nothing.
        assembler = Assembler(size, "retrieval", source.roles, 1, seed=0, negatives=source.negatives)
        for first in range(0, len(histories), size):
            chunk = histories[first : first + size]
            count = np.arange(len(chunk))
            kept = [source.max_items] * len(chunk) if max_items is None else max_items[first : first + size]
            cut = _Cut([slice(-items, None) for items in kept], num_candidates)
            yield assembler.assemble(self._rows(chunk, cut), BatchPlan(count, count, 0, 0, START))

    def _rows(self, histories: Sequence[History], cut: _Cut) -> Rows:
        roles = self._source.roles
        for history in histories:
            self._check(history)
        lengths = np.array([len(items) for items in cut.each([history.items for history in histories])], dtype=np.int64)
        nothing = np.zeros_like(lengths)
        needs_times = self._config.network.has_relative_bias
        side = {name: self._side(name, histories, cut) for name in roles.categories}
        return Rows(
            user_ids=np.arange(len(histories)),
            lengths=lengths,
            num_candidates=np.full_like(lengths, cut.num_candidates),
            num_labels=nothing,
            items=self.encode(roles.item, cut.joined([history.items for history in histories])),
            actions=self.encode(roles.action, cut.joined([history.actions for history in histories]))
            if roles.action
            else None,
            timestamps=np.array(cut.joined([history.timestamps for history in histories]), dtype=np.int64)
            if needs_times
            else None,
            context={
                name: np.concatenate([self._context(name, each) for each in histories]) for name in roles.contextual
            },
            side={name: ids for name, (ids, _) in side.items()},
            list_lengths={name: counts for name, (_, counts) in side.items() if counts is not None},
            numbers=np.concatenate([self._numbers(name, histories, cut) for name in roles.numbers], axis=1)
            if roles.numbers
            else None,
            held_out=nothing,
        )

    def _context(self, feature: str, history: History) -> np.ndarray:
        """The value of one feature, int64 [1]. One that is not given is unknown, too, but not noted."""
        value = history.context.get(feature, history.user if feature == USER_FEATURE else None)
        return np.array([self._vocabularies[feature].unknown]) if value is None else self.encode(feature, [value])

    def _side(self, name: str, histories: Sequence[History], cut: _Cut) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids, how many of them each event has) of a side feature; None where each has one."""
        if name in self._of_times:
            return self._from_times(name, histories, cut), None
        values = [
            self._of_items(name, history.items) if name not in history.features else history.features[name]
            for history in histories
        ]
        of_events = cut.joined(values)
        if name not in self._source.roles.lists:
            return self._encoded(name, of_events), None
        lists = [value if isinstance(value, (list, tuple)) and value else [None] for value in of_events]
        counts = np.array([len(each) for each in lists], dtype=np.int64)
        return self._encoded(name, [value for each in lists for value in each]), counts

    def _numbers(self, name: str, histories: Sequence[History], cut: _Cut) -> np.ndarray:
        """float32 [events, width] of a number or a vector, NaN where it is missing."""
        roles = self._source.roles
        width = roles.number_widths[roles.numbers.index(name)]
        found = []
        for history, newest in zip(histories, cut.newest, strict=True):
            if name in history.features:
                found.append(_as_numbers(name, history.features[name][newest], width, history.user))
                continue
            assert self._store is not None, "_check lets no history pass that lacks a feature"
            codes = self._item_codes.encode(history.items[newest])
            known = codes != self._item_codes.unknown
            of_items = np.full((len(codes), width), np.nan, dtype=np.float32)
            of_items[known] = self._store.item_numbers(name)[codes[known]]
            found.append(of_items)
        return np.concatenate(found)

    def _encoded(self, name: str, values: Sequence[Any]) -> np.ndarray:
        """What the model gets for values, None of which are missing: those the data calls unknown, too."""
        missing = np.array([value is None for value in values], dtype=bool)
        ids = np.repeat(self._vocabularies[name].encode([UNKNOWN]), len(values))
        ids[~missing] = self.encode(name, [value for value in values if value is not None])
        return ids

    def _from_times(self, name: str, histories: Sequence[History], cut: _Cut) -> np.ndarray:
        times = [np.asarray(history.timestamps, dtype=np.int64) for history in histories]
        offsets = run_offsets(np.array([len(each) for each in times]))
        joined = np.concatenate(times)
        first = self._first_times(histories, joined) if name == "item_age" else None
        codes = time_codes(name, np.arange(offsets[-1]), joined, offsets, first)
        if name == "time_gap" and cut.num_candidates:
            firsts = offsets[1:] - cut.num_candidates
            candidates = ranges(firsts, np.full_like(firsts, cut.num_candidates))
            codes[candidates] = gap_codes(joined[candidates] - np.repeat(joined[firsts - 1], cut.num_candidates))
        return np.concatenate(cut.each(np.split(codes, offsets[1:-1])))

    def _first_times(self, histories: Sequence[History], times: np.ndarray) -> np.ndarray:
        """When the item of each event had its first event, int64; an item that the data does not have is new."""
        assert self._store is not None, "_check lets no history pass"
        codes = self._item_codes.encode([item for history in histories for item in history.items])
        known = codes != self._item_codes.unknown
        return np.where(known, self._store.first_times()[np.where(known, codes, 0)], times)

    def _of_items(self, name: str, items: Sequence[Any] | np.ndarray) -> list[Any]:
        """Raw values of a feature of items, from the data; None for an item that the data does not have."""
        assert self._store is not None, "_check lets no history pass that lacks a feature"
        codes = self._item_codes.encode(items)
        known = codes != self._item_codes.unknown
        values, offsets = self._store.item_values(name)
        raw = self._vocabularies[name].raw_ids
        assert raw is not None, "features of items have vocabularies"
        if offsets is None:
            return [raw[values[code]] if found else None for code, found in zip(codes, known, strict=True)]
        return [
            raw[values[offsets[code] : offsets[code + 1]]].tolist() if found else None
            for code, found in zip(codes, known, strict=True)
        ]

    @cached_property
    def _item_codes(self) -> Vocabulary:
        """Raw items → the codes by which the data has their features."""
        assert self._store is not None
        item = self._source.roles.item
        return replace(self._vocabularies[item], raw_ids=self._store.raw_ids(item), keeps_raw=False)

    def _check(self, history: History) -> None:
        roles, items = self._source.roles, len(history.items)
        of_user = f"the history of {history.user!r}"
        if not items:
            raise DataError(f"{of_user} has no items; give at least one")
        reads_times = [f"the model reads {name!r}, which follows from the times" for name in self._of_times]
        if self._config.network.has_relative_bias:
            reads_times = ["the model reads times"]
        needed = {
            "actions": (history.actions, roles.action and f"the model reads {roles.action!r}"),
            "timestamps": (history.timestamps, reads_times[0] if reads_times else None),
            **{f"features {name!r}": (history.features.get(name), self._needs(name)) for name in roles.side},
        }
        if "item_age" in self._of_times and self._store is None:
            raise DataError(
                "the model reads 'item_age', the time since an item's first event, and there is no data to take it "
                "from; put the data of the run back"
            )
        for name, (given, reason) in needed.items():
            if reason and given is None:
                raise DataError(f"{of_user} has no {name}, but {reason}: give one per item")
            if given is not None and len(given) != items:
                raise DataError(f"{of_user} has {len(given)} {name} for {items} items; give one per item")
        for what, names, known in (
            ("contextual feature", history.context, roles.contextual),
            ("feature of items or events", history.features, [x for x in roles.side if x not in self._of_times]),
        ):
            if unknown := [name for name in names if name not in known]:
                raise DataError(
                    f"{of_user}: the model has no {what} {', '.join(map(repr, unknown))}; "
                    f"it has {', '.join(known) or 'none'}"
                )

    def _needs(self, name: str) -> str | None:
        """Why a history must give a side feature; None where it need not."""
        if name in self._of_times:
            return None
        if self._store is None:
            return "the model reads it, and there is no data to take it from"
        of_items = (*self._store.item_side_features, *self._store.item_number_features)
        return None if name in of_items else "the model reads this feature of events"


class _Cut(NamedTuple):
    """What of each history a batch has."""

    newest: list[slice]
    """Its newest items."""
    num_candidates: int
    """The newest of these, which are candidates."""

    def each(self, values: Iterable[Any]) -> list[Any]:
        """The values of the newest events of each history; None where it has none."""
        return [None if of_one is None else of_one[newest] for of_one, newest in zip(values, self.newest, strict=True)]

    def joined(self, values: Iterable[Sequence[Any] | np.ndarray | None]) -> list[Any]:
        """The same, one history after another."""
        return [value for of_one in self.each(values) if of_one is not None for value in of_one]


def _as_numbers(name: str, values: Sequence[Any], width: int, user: Any) -> np.ndarray:
    """float32 [n, width], NaN in place of None. Raises DataError for what is no number."""
    numbers = np.full((len(values), width), np.nan, dtype=np.float32)
    for place, value in enumerate(values):
        if value is None:
            continue
        try:
            with np.errstate(over="ignore"):
                numbers[place] = np.array(value, dtype=np.float32).reshape(width)
            is_right = not np.isinf(numbers[place]).any()
        except (TypeError, ValueError):
            is_right = False
        if not is_right:
            what = "a finite number" if width == 1 else f"a list of {width} finite numbers"
            raise DataError(f"the history of {user!r}: a value of {name!r} is {value!r}; give {what}, or None")
    return numbers
