"""From requests in raw ids to the rows that the program reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .files import Safetensors, Table, Vocabulary, rows_at
from .requests import Candidates, History, ServingError

_NO_EVENT = -(2**63)
"""Time of the newest event of a user who has done nothing yet."""
Rows = dict[str, Tensor]
"""Inputs of the program that have a row per event, and "times" int64 [n]; "context" [C, .] and "at" of the user."""


class Encoder:
    """Looks up what the program reads of histories and candidates.

    Args:
        facts: of serving.json.
        tables: by name.
        vocabulary: ids, and what is known of items.
    """

    def __init__(self, facts: Mapping[str, Any], tables: Mapping[str, Table], vocabulary: Safetensors) -> None:
        self.facts, self._tables, self._stored = facts, tables, vocabulary
        self.vocabularies = {name: Vocabulary(vocabulary, name, each) for name, each in facts["features"].items()}

    def knows_of_items(self, feature: str) -> bool:
        """Whether the value that each item has of a feature is known, so that requests need not give it."""
        return f"item.{feature}" in self._stored

    @property
    def items(self) -> Vocabulary:
        """The items."""
        return self.vocabularies[self.facts["item"]]

    def history(self, history: History, at: int | None, room: int) -> Rows:
        """The newest ``room`` events and the user. Raises ServingError for a history that the model cannot read."""
        self._check(history, at)
        facts = self.facts
        names = [*facts["side"], *facts["known_after"]]
        if not history.items:  # of a user who has done nothing yet
            nothing = dict.fromkeys(self._given([*names, *(entry["name"] for entry in facts["numbers"])]), ())
            history = replace(history, actions=(), timestamps=(), features=nothing)
        rows = self._features(history, names, facts["numbers"], "a history has")
        if facts["action"]:
            rows["actions"] = self._rows(facts["action"], history.actions or ())
        rows["items"] = self._rows(facts["item"], history.items)
        if facts["reads_times"]:
            rows["times"] = _times(history.timestamps or ())
        rows = {name: values[max(0, len(values) - room) :] for name, values in rows.items()}
        if facts["contextual"]:
            given = {"user_id": history.user, **history.context}
            rows["context"] = torch.cat([self._of_user(name, given.get(name)) for name in facts["contextual"]])
        if facts["reads_times"]:
            rows["at"] = rows["times"][-1] if at is None else torch.tensor(at)
        return rows

    def candidates(self, candidates: Candidates, history: History, at: int | None) -> Rows:
        """Candidates that are shown to the user of ``history`` at ``at``; their actions are zeros."""
        count, facts = len(candidates.items), self.facts
        newest = int(list(history.timestamps)[-1]) if history.timestamps else _NO_EVENT
        times = [max(newest, 0) if at is None else at] * count
        shown = History(candidates.items, timestamps=times, features=candidates.features)
        known = [*facts["side"], *(entry["name"] for entry in facts["numbers"] if not entry["known_after"])]
        self._check_names("feature that is known before an event,", candidates.features, self._given(known))
        for name, values in candidates.features.items():
            if len(values) != count:
                raise ServingError(f"{len(values)} {name} for {count} candidates; give one per candidate")
        rows = self._features(shown, facts["side"], facts["numbers"], "the candidates have", newest)
        rows["items"] = self._rows(facts["item"], shown.items)
        rows["actions"] = torch.zeros(count, self._table(facts["action"]).dim)
        if facts["known_after"]:
            rows["known_after"] = torch.zeros(count, sum(self._table(name).dim for name in facts["known_after"]))
        if facts["reads_times"]:
            rows["times"] = _times(times)
        return rows

    def _check(self, history: History, at: int | None) -> None:
        count, facts = len(history.items), self.facts
        if not count and (facts["task"] == "retrieval" or (at is None and facts["reads_times"])):
            needed = "give at least one" if facts["task"] == "retrieval" else "give the time of the request"
            raise ServingError(f"a history has no items; {needed}")
        if count and facts["action"] and history.actions is None:
            raise ServingError(f"a history has no actions, but the model reads {facts['action']!r}: give one per item")
        if count and facts["reads_times"] and history.timestamps is None:
            raise ServingError("a history has no timestamps, but the model reads times: give one per item")
        for what, values in {"actions": history.actions, "timestamps": history.timestamps, **history.features}.items():
            if values is not None and len(values) != count:
                raise ServingError(f"a history has {len(values)} {what} for {count} items; give one per item")
        names = [*facts["side"], *facts["known_after"], *(entry["name"] for entry in facts["numbers"])]
        self._check_names("contextual feature", history.context, facts["contextual"])
        self._check_names("feature of items or events", history.features, self._given(names))
        if at is None:
            return
        if not facts["reads_request_time"]:
            raise ServingError("the model does not read the time of a request; leave it out")
        newest = max(map(int, history.timestamps or [at]))
        if newest > at:
            raise ServingError(f"a history has an event at {newest}, which is later than the request at {at}")

    def _given(self, names: Sequence[str]) -> list[str]:
        """Those features that do not follow from times."""
        return [name for name in names if self.facts["features"].get(name, {}).get("kind") != "time"]

    def _check_names(self, what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
        for name in given:
            if name not in known:
                raise ServingError(f"the model has no {what} {name!r}; it has {', '.join(known) or 'none'}")

    def _features(
        self, events: History, names: Sequence[str], numbers: Sequence[Any], who: str, before: int | None = None
    ) -> Rows:
        """The inputs side, known_after and numbers. ``before``: of candidates, the time of the user's newest event."""
        places = self.items.places(events.items)
        found: dict[str, list[Tensor]] = {}
        for name in names:
            role = "known_after" if name in self.facts["known_after"] else "side"
            found.setdefault(role, []).append(self._side(name, events, places, who, before))
        for entry in numbers:
            name, width = entry["name"], entry["width"]
            if name in events.features:
                values = _as_numbers(name, events.features[name], width)
            elif self.knows_of_items(name):
                values = rows_at(self._stored.tensor(f"item.{name}"), places)
                values = values.masked_fill((places < 0)[:, None], math.nan)
            elif before is not None and entry["known_after"]:
                values = torch.full((len(places), width), math.nan)
            else:
                raise _lacks(who, name)
            found.setdefault("numbers", []).append(values)
        return {role: torch.cat(values, dim=1) for role, values in found.items()}

    def _side(self, name: str, events: History, places: Tensor, who: str, before: int | None) -> Tensor:
        """Rows [n, width] of one feature; of a list their mean."""
        facts, vocabulary, table = self.facts["features"][name], self.vocabularies[name], self._table(name)
        if facts["kind"] == "time":
            return table.rows(vocabulary.rows_of(self._time_codes(name, events, places, before)))
        if name in events.features:
            given = events.features[name]
            if not facts["is_list"]:
                return table.rows(vocabulary.rows_or_missing(given))
            lists = [each if isinstance(each, (list, tuple)) and each else [None] for each in given]
            rows = vocabulary.rows_or_missing([value for each in lists for value in each])
            return _means(table.rows(rows), torch.tensor([len(each) for each in lists], dtype=torch.int64))
        if not self.knows_of_items(name):
            raise _lacks(who, name)
        rows = self._stored.tensor(f"item.{name}")
        if not facts["is_list"]:
            return table.rows(rows_at(rows, places).masked_fill(places < 0, vocabulary.missing))
        offsets, known = self._stored.tensor(f"item.{name}.offsets"), places.clamp(min=0)
        lengths = (rows_at(offsets[1:], known) - rows_at(offsets, known)).masked_fill(places < 0, 1)
        event = torch.repeat_interleave(lengths)
        inside = torch.arange(len(event)) - (lengths.cumsum(0) - lengths)[event]
        chosen = rows_at(rows, rows_at(offsets, known)[event] + inside)
        return _means(table.rows(chosen.masked_fill(places[event] < 0, vocabulary.missing)), lengths)

    def _time_codes(self, name: str, events: History, places: Tensor, before: int | None) -> Tensor:
        """int64 [n], as preprocessing makes hour_of_day, day_of_week (both UTC), time_gap and item_age."""
        times = _times(events.timestamps or ())
        if name == "hour_of_day":
            return times // 3600 % 24
        if name == "day_of_week":
            return (times // 86400 + 3) % 7  # 1970 began on a Thursday
        if name == "item_age":
            first = rows_at(self._stored.tensor("item_first_times"), places)
            ages = (times - torch.where(places < 0, times, first)).clamp(min=0)
            return (_bit_lengths(1 + ages) - 1).clamp(max=39)
        if before == _NO_EVENT:
            return torch.zeros_like(times)
        if before is not None:
            return _bit_lengths(1 + (times - before)).clamp(max=40)
        codes = _bit_lengths(1 + times.diff(prepend=times[:1])).clamp(max=40)
        codes[:1] = 0
        return codes

    def _of_user(self, feature: str, value: Any) -> Tensor:
        """float32 [1, width]; zeros for a value that is unknown or not given."""
        return self._table(feature).rows(torch.tensor([-1])) if value is None else self._rows(feature, [value])

    def _rows(self, feature: str, values: Sequence[Any]) -> Tensor:
        return self._table(feature).rows(self.vocabularies[feature].rows(values))

    def _table(self, feature: str) -> Table:
        return self._tables[self.facts["features"][feature]["table"]]


def _lacks(who: str, name: str) -> ServingError:
    return ServingError(f"{who} no feature {name!r}, which the model reads: give one value per item")


def _times(timestamps: Sequence[int]) -> Tensor:
    return torch.tensor([int(time) for time in timestamps], dtype=torch.int64)


def _bit_lengths(numbers: Tensor) -> Tensor:
    """1 plus the base-2 logarithm, rounded down, of int64 [n] numbers of at least 1."""
    return torch.tensor([number.bit_length() for number in numbers.tolist()], dtype=torch.int64)


def _means(rows: Tensor, lengths: Tensor) -> Tensor:
    """Means of runs of rows [sum of lengths, width], one run for each of the lengths int64 [n]: [n, width]."""
    run = torch.repeat_interleave(lengths)
    return rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, run, rows) / lengths[:, None]


def _as_numbers(name: str, values: Sequence[Any], width: int) -> Tensor:
    """float32 [n, width], NaN in place of None."""
    rows = []
    for value in values:
        if value is None:
            rows.append(torch.full((width,), math.nan))
            continue
        try:
            row = torch.tensor(value, dtype=torch.float32).reshape(width)
        except (TypeError, ValueError, RuntimeError):
            row = torch.full((width,), math.inf)
        if row.isinf().any():
            what = "a finite number" if width == 1 else f"a list of {width} finite numbers"
            raise ServingError(f"a value of {name!r} is {value!r}; give {what}, or None")
        rows.append(row)
    return torch.stack(rows) if rows else torch.empty(0, width)
