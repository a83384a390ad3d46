"""Keys and values of the histories of users, so that a request computes only what is new since the one before: a layer
reads earlier tokens only through these. Source: M-FALCON, arXiv 2402.17152, sec. 3.4."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .requests import History

_BYTES_PER_VALUE = 64
"""About what a value of an event takes in a list."""


@dataclass(frozen=True)
class Prefix:
    """The context and the first events of a history, as a model has computed them."""

    history: History
    """The events, preceded by ``before`` events of which only the time matters."""
    before: int
    end: int = 0
    """Tokens of the whole history when the keys and values were computed: windows may depend on it."""
    num_items: int = 0
    """Number of events whose keys and values are in ``keys_values``. 0: of no token."""
    keys_values: Tensor = torch.empty(0)
    """float32 [L, 2, H, n, d]; [0] of no token."""
    times: Tensor = torch.empty(0, dtype=torch.int64)
    """int64 [n], in seconds; zeros if the model reads none."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        values = len(self.history.items) * (3 + len(self.history.features)) * _BYTES_PER_VALUE
        return self.keys_values.numel() * 4 + self.times.numel() * 8 + values

    def valid_for(self, facts: Mapping[str, Any], nothing: Prefix) -> Prefix:
        """What stays of it for the history of ``nothing``, of which the newest is computed anew."""
        own, other, before, end = self.history, nothing.history, nothing.before, nothing.end
        starts = [(each.timestamps or [])[:1] if before else [] for each in (own, other)]
        if (own.context, own.user, self.before, starts[0]) != (other.context, other.user, before, starts[1]):
            return nothing
        columns = [(own.items, other.items), (own.actions, other.actions), (own.timestamps, other.timestamps)]
        columns += [(own.features.get(name), other.features.get(name)) for name in {**own.features, **other.features}]
        same = min(_common(*both, before) for both in columns) - newest_changes(facts)  # what follows it may differ
        context, per_item = len(facts["contextual"]), facts["tokens_per_item"]
        stable = context + min(same, self.num_items) * per_item
        span, full = facts["cached"]["span"], facts["cached"]["full_tokens"]
        if span is not None and full:  # tokens that a window limits at one of both ends, and not at the other
            first, last = sorted((self.end, end))
            limited = max(first - full, context + span + 1)
            stable = min(stable, limited) if limited < last - full else stable
        newest_is_new = newest_changes(facts) or facts["task"] == "retrieval"  # which predicts from it
        items = min((stable - context) // per_item, len(other.items) - before - newest_is_new)
        if items <= 0:
            return nothing
        tokens = context + items * per_item
        kept = self.keys_values.narrow(3, 0, tokens)
        return replace(nothing, num_items=items, keys_values=kept, times=self.times[:tokens])

    def followed_by(
        self, facts: Mapping[str, Any], events: int, computed: Sequence[Tensor], times: Tensor | None, first: int
    ) -> Prefix:
        """With further ``events``, but for a newest one that later events change. ``computed``: keys, values of each
        layer, [n, H, d] each; ``times``: int64 [n]. The tokens of these events begin at ``first``."""
        items = events - newest_changes(facts)
        if items <= 0:
            return replace(self, keys_values=self.keys_values.contiguous())  # no view of more
        count = items * facts["tokens_per_item"] + len(facts["contextual"]) * (not self.num_items)
        tokens = slice(first, first + count)
        new = torch.stack([each[tokens] for each in computed]).unflatten(0, (-1, 2)).transpose(2, 3)
        seconds = torch.zeros(count, dtype=torch.int64) if times is None else times[tokens]
        return replace(
            self,
            num_items=self.num_items + items,
            keys_values=torch.cat([self.keys_values, new], dim=3),
            times=torch.cat([self.times, seconds]),
        )


def newest_changes(facts: Mapping[str, Any]) -> bool:
    """Whether the next event, or the time of a request, changes the keys and values of the newest event."""
    return "token_times" in facts["inputs"] and bool(facts["asks_for_next"])


def _common(own: Sequence[Any] | None, other: Sequence[Any] | None, before: int) -> int:
    """Number of equal values at the beginning, after the first ``before`` of both."""
    if own is None or other is None:
        return 0 if own is not other else 1 << 60
    own, other = list(own[before:]), list(other[before:])
    length = min(len(own), len(other))
    if own[:length] == other[:length]:
        return length
    return next(place for place in range(length) if own[place] != other[place])


def joined_prefixes(facts: Mapping[str, Any], prefixes: Sequence[Prefix | None]) -> dict[str, Tensor]:
    """Inputs of the program: prefixes padded, at the beginning, to the longest, and to one token at least."""
    lengths = [0 if each is None else len(each.times) for each in prefixes]
    cached, longest = facts["cached"], max(1, *lengths)
    padded = torch.empty(len(prefixes), cached["layers"], 2, facts["heads"], longest, cached["channels"])
    times = torch.zeros(len(prefixes), longest, dtype=torch.int64)
    for place, (each, length) in enumerate(zip(prefixes, lengths, strict=True)):
        padded[place, :, :, :, : longest - length] = 0
        if each is not None and length:
            padded[place, :, :, :, longest - length :] = each.keys_values
            times[place, longest - length :] = each.times
    return {"prefix": padded, "prefix_lengths": torch.tensor(lengths), "prefix_times": times}


class PrefixCache:
    """Prefixes by user in at most ``max_bytes`` of memory. Those that were used longest ago go first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._lock = Lock()
        self._found: OrderedDict[Hashable, tuple[Hashable, Prefix]] = OrderedDict()

    def find(self, user: Hashable, model: Hashable) -> Prefix | None:
        """What ``model`` has computed of a user."""
        with self._lock:
            whose, prefix = self._found.get(user, (None, None))
            if prefix is None or whose != model:
                return None
            self._found.move_to_end(user)
            return prefix

    def put(self, user: Hashable, model: Hashable, prefix: Prefix) -> None:
        """Replace what is known of a user."""
        self.drop(user)
        with self._lock:
            self._found[user] = model, prefix
            self.num_bytes += prefix.num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._found.popitem(last=False)[1][1].num_bytes

    def drop(self, user: Hashable) -> None:
        """Forget a user."""
        with self._lock:
            if user in self._found:
                self.num_bytes -= self._found.pop(user)[1].num_bytes
