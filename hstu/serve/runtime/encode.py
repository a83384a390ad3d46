"""Convert raw ids of requests to the ids that a model reads: for an exported model, rows of its tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress, groupby
from reprlib import repr
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .files import Vocabulary, int64s, rows_at, run_indices
from .requests import Candidates, History, ServingError, candidate_problems, feature_names, history_problems, name_of
from .running import Questions, RunningStatistics

_RUNNING = "running."
"""Prefix of the tables of running statistics among ``known``."""
_VALUES_OF_TEXT = 6
_NO_EVENT = -(2**63)
"""Stands for the time of the newest event of a user without events."""


@dataclass(frozen=True)
class Events:
    """Events of one user, oldest first, or candidates for the user."""

    ids: dict[str, Tensor]
    """Feature → table row of each event, int64 [n]; for a list, the rows of all its values, event after event."""
    counts: dict[str, Tensor]
    """List feature → number of its values at each event, int64 [n]."""
    numbers: Tensor | None
    """float32 [n, W]: concatenated numbers and vectors, NaN for missing. None: the model reads none."""
    times: list[int]
    """Seconds, one per event. Empty if the model reads no times."""
    context: dict[str, Tensor] = field(default_factory=dict)
    """Contextual feature → table row, int64 [1]. Empty for candidates."""
    at: int | None = None
    """Time of the request, in seconds. None: for candidates, and if the model reads no times."""
    length: int = 0
    """Number of events or candidates."""

    def part(self, first: int, stop: int) -> Self:
        """Some consecutive events."""
        inner = {name: slice(int(each[:first].sum()), int(each[:stop].sum())) for name, each in self.counts.items()}
        return replace(
            self,
            ids={name: ids[inner.get(name, slice(first, stop))] for name, ids in self.ids.items()},
            counts={name: values[first:stop] for name, values in self.counts.items()},
            numbers=None if self.numbers is None else self.numbers[first:stop],
            times=self.times[first:stop],
            length=stop - first,
        )


@dataclass(eq=False)
class Encoder:
    """Converts histories and candidates to ids, numbers and times that a model reads."""

    facts: Mapping[str, Any]
    """The entries of serving.json that describe requests."""
    vocabularies: Mapping[str, Vocabulary]
    known_items: Vocabulary
    """The vocabulary of the items with stored features."""
    known: Mapping[str, Tensor]
    """The stored features of ``known_items``: ``item.<feature>``, with ``.offsets`` for lists."""
    error: ClassVar[type[Exception]] = ServingError
    """Exception class for a request that the model cannot read."""

    def __post_init__(self) -> None:
        self.items = self.vocabularies[self.facts["item"]]
        """The vocabulary of items that the model reads."""

    @cached_property
    def running(self) -> RunningStatistics | None:
        """Computes the running statistics that requests do not give. None: the model reads none."""
        found = {name.removeprefix(_RUNNING): each for name, each in self.known.items() if name.startswith(_RUNNING)}
        return RunningStatistics(found) if found else None

    @property
    def running_names(self) -> list[str]:
        """Running statistics that the model reads."""
        return [entry["name"] for entry in self.facts["numbers"] if entry.get("is_running")]

    @property
    def given_features(self) -> dict[str, bool]:
        """Feature of items or events, except time features → whether a request must contain it."""
        optional = {name.removeprefix("item.") for name in self.known} | {*self.running_names}
        return {name: name not in optional for name in feature_names(self.facts)}

    @property
    def known_before(self) -> list[str]:
        """Features that a request may contain for candidates; retrieval reads none."""
        return [] if self.facts["task"] == "retrieval" else feature_names(self.facts, known_after=False)

    @cached_property
    def described(self) -> dict[str, dict[str, Any]]:
        """Item, action, contextual feature, feature of items or events → what a request gives for it. JSON.

        "type", and "is_list" for lists and vectors; "count" and the first "values" that the model has: ranges for a
        number, none for users. "required": every event needs it; "before": candidates may have it.
        """
        facts, required = self.facts, self.given_features
        kinds = {name: own.described(facts["features"][name]["is_list"]) for name, own in self.vocabularies.items()}
        if "user_id" in kinds:
            kinds["user_id"]["values"] = []  # ids of users are private
        for each in facts["numbers"]:
            width, values = each["width"], ["{:g}..{:g}".format(*each["seen"])] if each.get("seen") else []
            kind = "number" if width == 1 else f"{width} numbers"
            kinds[each["name"]] = {"type": kind, "is_list": width > 1, "count": len(values), "values": values}
        return {
            name: {**kinds[name], "required": required.get(name, False), "before": name in self.known_before}
            for name in filter(None, (facts["item"], facts["action"], *facts["contextual"], *required))
        }

    def text_of(self, name: str) -> str:
        """A feature with its type and values, such as "device (text: phone, tv, web)"."""
        entry = self.described[name]
        values = [str(value) for value in entry["values"][:_VALUES_OF_TEXT]]
        values += [f"… {entry['count']:,} values"] * (entry["count"] > len(values))
        return f"{name} ({'list of ' * entry['is_list']}{entry['type']}{': ' * bool(values)}{', '.join(values)})"

    def histories(self, asked: Sequence[tuple[History, int | None, int]]) -> list[Events]:
        """Encode context and newest ``room`` events of each (history, time of the request, room). Raises ``error``."""
        runs = groupby(asked, lambda each: (len(each[0].items) > 0, each[0].features.keys()))
        return joined(self._alike([*run]) for _, run in runs)

    def _alike(self, asked: Sequence[tuple[History, int | None, int]]) -> list[Events]:
        """As :meth:`histories`, of histories that give the same features: their values are looked up together."""
        facts, shown, times, before, ends = self.facts, list[History](), list[int](), list[int](), list[int | None]()
        for history, at, room in asked:
            for problem in history_problems(history, at, facts, self.text_of):
                raise self.error(problem)
            newest, features = slice(max(0, len(history.items) - room), None), history.features
            shown.append(replace(history, features=self._with_running(features, history, None)).cut(newest))
            if facts["reads_times"]:
                seconds = [*map(int, () if history.timestamps is None else history.timestamps)]
                times += seconds[newest]
                before += [_NO_EVENT, *seconds[:-1]][newest]
                at = seconds[-1] if at is None else at
            ends.append(at)
        columns = {name: joined(each.features[name] for each in shown) for name in shown[0].features}
        if not len(asked[0][0].items):  # an empty history needs no features
            columns, before = {name: [] for name in self.given_features}, []
        actions = joined(each.actions for each in shown if each.actions is not None)
        every = History(items=joined(each.items for each in shown), actions=actions, features=columns)
        events, stop, found = self._events(every, times, before, f"{name_of(shown[0])} has"), 0, []
        users = [{"user_id": each.user, **each.context} for each in shown]
        rows = {name: self.vocabularies[name].rows([each.get(name) for each in users]) for name in facts["contextual"]}
        for place, each in enumerate(shown):
            first, stop = stop, stop + len(each.items)
            context = {name: values[place : place + 1] for name, values in rows.items()}
            found.append(replace(events.part(first, stop), context=context, at=ends[place]))
        return found

    def candidates(self, candidates: Candidates, history: History, at: int | None, parts: int = 1) -> list[Events]:
        """Encode candidates for the user of ``history`` at time ``at``, divided evenly into ``parts``."""
        count, newest = len(candidates.items), _NO_EVENT
        if self.facts["reads_times"] and history.timestamps is not None and len(history.timestamps):
            newest = int(history.timestamps[-1])
        for problem in candidate_problems(candidates, self.facts, self.text_of):
            raise self.error(problem)
        times = [max(newest, 0) if at is None else at] * count
        candidates = Candidates(candidates.items, self._with_running(candidates.features, history, (candidates, times)))
        events = self._events(candidates, times, [newest] * count, "the candidates have")
        return [events.part(count * part // parts, count * (part + 1) // parts) for part in range(parts)]

    def room(self, count: int) -> tuple[int, int]:
        """For ``count`` candidates: (events of a history, even parts into which to divide the candidates).
        ``max_items`` less the most candidates are kept; without a limit of candidates, as many as fit beside a part."""
        longest, rule = self.facts["max_items"], self.facts["candidates"]
        number = -(-count // (rule["most"] or min(count, longest - 1) or 1))
        return longest - ((rule["most"] or -(-count // max(number, 1))) if rule["trained"] else 1), number

    def unknown(self, requests: Sequence[Sequence[History]]) -> list[dict[str, list[Any]]]:
        """For each request, feature → distinct values of its histories that the model lacks, sorted as texts."""
        found: list[dict[str, list[Any]]] = [{} for _ in requests]
        columns = [[self._columns(history) for history in own] for own in requests]
        for name in sorted(self.vocabularies.keys() & {name for own in columns for each in own for name in each}):
            vocabulary = self.vocabularies[name]
            values = [joined(each.get(name, ()) for each in own) for own in columns]
            if self.facts["features"][name]["is_list"]:
                values = [joined(v if isinstance(v, (list, tuple)) else [v] for v in own) for own in values]
            is_unknown = iter((vocabulary.rows(joined(values)) == vocabulary.unknown).tolist())
            for unknown, own in zip(found, values, strict=True):
                if distinct := {*compress(own, is_unknown)} - {None}:
                    unknown[name] = sorted(distinct, key=str)
        return found

    def _columns(self, history: History) -> dict[str, Sequence[Any]]:
        """Item, action or feature → its values in a history."""
        found = {self.facts["item"]: history.items, **history.features}
        found |= {name: [value] for name, value in {"user_id": history.user, **history.context}.items()}
        return found if history.actions is None else {**found, self.facts["action"]: history.actions}

    def _with_running(
        self, given: Mapping[str, Sequence[Any]], history: History, asked: tuple[Candidates, list[int]] | None
    ) -> Mapping[str, Sequence[Any]]:
        """Add running statistics that are not given: of the events, or of candidates at times after all of them."""
        missing = [name for name in self.running_names if name not in given]
        if not missing or self.running is None:
            return given
        items = self.known_items.places(history.items)[None]
        seconds = () if history.timestamps is None else history.timestamps
        times = torch.tensor([[int(time) for time in seconds]], dtype=torch.int64)
        places, wanted, at = torch.arange(items.shape[1]), items[0], times[0]
        if asked is not None:
            wanted, at = self.known_items.places(asked[0].items), int64s(asked[1])
            places = torch.full_like(at, items.shape[1])
        questions = Questions(torch.zeros_like(places), places, wanted, at)
        found = self.running.numbers(items, self._values(history), times, questions)
        columns = dict(zip(self.running.names, found.T.tolist(), strict=True))
        return {**given, **{name: columns[name] for name in missing}}

    def _values(self, history: History) -> Tensor:
        """The actions of a history as numbers, float64 [1, n]."""
        try:
            actions = [0] * len(history.items) if history.actions is None else history.actions
            return torch.tensor([[float(action) for action in actions]], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise self.error(f"{name_of(history)} has an action that is no number: {error}") from None

    def _events(self, shown: History | Candidates, times: list[int], before: list[int], who: str) -> Events:
        """``before``: time of the user's previous event for each."""
        facts, places, counts = self.facts, self.known_items.places(shown.items), dict[str, Tensor]()
        is_known = self.known_items is self.items and self.items.kind != "raw"  # raw ids have no places
        ids = {facts["item"]: self.items.rows_of(places) if is_known else self.items.rows(shown.items)}
        if facts["action"]:
            actions = self.vocabularies[facts["action"]]
            given = shown.actions if isinstance(shown, History) else None
            ids[facts["action"]] = torch.full_like(places, actions.unknown) if given is None else actions.rows(given)
        for name in (*facts["side"], *facts["known_after"]):
            vocabulary, is_list = self.vocabularies[name], facts["features"][name]["is_list"]
            if isinstance(shown, Candidates) and name in facts["known_after"]:
                ids[name] = torch.full_like(places, vocabulary.unknown)
            elif facts["features"][name]["kind"] == "time":
                ids[name] = vocabulary.rows_of(_time_codes(name, int64s(times), int64s(before)))
            elif name in shown.features and is_list:
                lists = [each if isinstance(each, (list, tuple)) and each else [None] for each in shown.features[name]]
                ids[name], counts[name] = vocabulary.rows(joined(lists)), int64s([*map(len, lists)])
            elif name in shown.features:
                ids[name] = vocabulary.rows(shown.features[name])
            elif is_list:
                ids[name], counts[name] = self._lists_of_items(name, places, who)
            else:
                ids[name] = rows_at(self._of_items(name, who), places).masked_fill_(places < 0, vocabulary.missing)
            if is_list:
                counts.setdefault(name, torch.ones_like(places))
        numbers = [self._numbers(entry, shown, places, who) for entry in facts["numbers"]]
        row = torch.cat(numbers, dim=1) if numbers else None
        return Events(ids, counts, row, times if facts["reads_times"] else [], length=len(places))

    def _lists_of_items(self, name: str, places: Tensor, who: str) -> tuple[Tensor, Tensor]:
        """(rows of all values of a list feature of known items, event after event; number of values per event)."""
        rows, offsets = self._of_items(name, who), self.known[f"item.{name}.offsets"]
        is_unknown, begins = places < 0, rows_at(offsets, places)
        counts = (rows_at(offsets[1:], places) - begins).masked_fill_(is_unknown, 1)
        event, inside = run_indices(counts)
        chosen = rows_at(rows, begins.index_select(0, event).add_(inside))
        return chosen.masked_fill_(is_unknown.index_select(0, event), self.vocabularies[name].missing), counts

    def _numbers(self, entry: Mapping[str, Any], shown: History | Candidates, places: Tensor, who: str) -> Tensor:
        """float32 [n, width]: one number or vector per event, NaN for None."""
        name, width = entry["name"], entry["width"]
        if name not in shown.features:
            if entry["known_after"] and isinstance(shown, Candidates):
                return torch.full((len(places), width), math.nan)
            return rows_at(self._of_items(name, who), places).masked_fill((places < 0)[:, None], math.nan)
        rows = [torch.empty(0, width)]
        for value in shown.features[name]:
            try:
                given = [math.nan] * width if value is None else value
                row = torch.tensor(given, dtype=torch.float32).reshape(1, width)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                row = torch.full((1, width), math.inf)
            if row.isinf().any():
                what = "a finite number" if width == 1 else f"a list of {width} finite numbers"
                raise self.error(f"a value of {name!r} is {repr(value)}; give {what}, or None")
            rows.append(row)
        return torch.cat(rows)

    def _of_items(self, name: str, who: str) -> Tensor:
        if f"item.{name}" not in self.known:
            raise self.error(
                f"{who} no feature {self.text_of(name)}, which the model reads and which is not known of the items: "
                "give one value per item"
            )
        return self.known[f"item.{name}"]


def joined(parts: Iterable[Iterable[Any]]) -> list[Any]:
    """All values of several sequences."""
    return [*chain.from_iterable(parts)]


def _time_codes(name: str, times: Tensor, before: Tensor) -> Tensor:
    """int64 [n]: hour_of_day, day_of_week (both UTC) or time_gap, computed as in preprocessing."""
    if name == "hour_of_day":
        return times // 3600 % 24
    if name == "day_of_week":
        return (times // 86400 + 3) % 7  # 1970 began on a Thursday
    is_first = before == _NO_EVENT
    seconds = 1 + (times - before).masked_fill(is_first, 0)  # the gap is 1 + ⌊log2(seconds)⌋
    gaps = torch.tensor([number.bit_length() for number in seconds.tolist()], dtype=torch.int64).clamp(max=40)
    return gaps.masked_fill(is_first, 0)
