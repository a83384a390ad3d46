"""Reports on a store: lines for the terminal, and report.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from hstu.base.errors import printable
from hstu.base.files import replace_text
from hstu.base.times import as_date
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore

REPORT = "report.md"
_CHUNK = 1 << 22
_TRUNCATED_AT = (50, 200, 1000)
"""Values of max_sequence_length whose truncation the report shows."""
_MOST_ACTIONS = 50


def format_report(store: SequenceStore) -> str:
    """The short report for the terminal."""
    found = store.statistics
    context = ", ".join(f"{name} ({store.cardinality(name):,})" for name in store.contextual_features) or "none"
    unused = store.cardinality(store.item_feature) - int(found["items"])
    also = f" and {unused:,} without events" if unused else ""
    sparsity = f"; sparsity {found['sparsity']:.4%}" if found["sparsity"] > 0 else ""  # not if events repeat
    lines = [
        f"{store.name}: {store.path}",
        f"  users {found['users']:,}, items {found['items']:,}{also}, events {found['events']:,}",
        f"  events per user: max {found['length_max']:,}, min {found['length_min']:,}, "
        f"mean {found['length_mean']:,.1f}, median {found['length_median']:,.0f}{sparsity}",
        f"  item {store.item_feature}, action {store.action_feature or 'none'}, "
        f"time {store.timestamp_feature or 'none (file order)'}, context {context}",
    ]
    of_items = (*store.item_side_features, *store.item_number_features)
    for kind, names in (("items", of_items), ("events", (*store.event_features, *store.event_number_features))):
        if names:
            shown = ", ".join(f"{name} ({_values_of(store, name)})" for name in names)
            lines.append(f"  features of {kind}: {shown}")
    if store.num_requests:
        requests, left_out = store.requests(), found.get("requests_left_out", 0)
        without = f"; left out {left_out:,} requests without an event of the user before" if left_out else ""
        lines.append(
            f"  requests {len(requests):,} of {len(np.unique(requests.users)):,} users; candidates "
            f"{store.num_candidates:,}, per request max {requests.sizes.max():,}, mean {requests.sizes.mean():,.1f}"
            f"{without}"
        )
    if events := store.events_by_split():
        shown = ", ".join(f"{split} {number:,}" for split, number in events.items())
        lines.append(f"  split {store.split}, in events: {shown}")
    if found["published"]:
        unlike = {name: value for name, value in found["published"].items() if abs(found[name] - value) >= 1}
        shown = "; ".join(f"{name} {found[name]:,.0f} instead of {unlike[name]:,}" for name in unlike)
        lines.append(
            f"  NOT the published statistics: {shown}. Not the complete data, or another release of it."
            if unlike
            else f"  as published: {', '.join(found['published'])}"
        )
    return "\n".join(lines)


def write_report(store: SequenceStore, folder: Path) -> Path:
    """Write report.md into ``folder``, in bounded memory except for one counter per item."""
    folder.mkdir(exist_ok=True)
    lengths, counts = np.diff(store.offsets()), _event_counts(store, store.item_feature)
    quantiles = [("events per user", lengths), ("events per item", counts[counts > 0])]
    if store.num_requests:
        requests = store.requests()
        quantiles.append(("candidates per request", requests.sizes))
        quantiles.append(("events before a request", requests.history_ends - store.offsets()[requests.users]))
    parts = [
        f"# {_as_text(store.name)}\n",
        "".join(f"    {line}\n" for line in printable(format_report(store)).splitlines()[1:]),
        "## Rows\n",
        _table(("", ""), _rows(store, lengths)),
        "## Lengths and popularity\n",
        _quantiles(quantiles),
        "## Most frequent\n",
        *(f"{_as_code(line)}\n" for line in _most_frequent(store, counts)),
        "## Raw files\n",
        _table(("file", "SHA-256"), store.sources.items()),
        f"Made by `{printable(store.command or 'a program', keep='').replace('`', chr(39))}`\n",
    ]
    replace_text(folder / REPORT, "\n".join(parts), shared=True)
    return folder / REPORT


def _rows(store: SequenceStore, lengths: np.ndarray) -> Iterator[tuple[str, object]]:
    """Skipped rows, the time span, and what training leaves out."""
    skipped = store.statistics.get("skipped_rows", {})
    yield from ((f"skipped: {why}", number) for why, number in sorted(skipped.items()))
    yield "skipped in all", sum(skipped.values())
    if store.timestamp_feature is not None:
        times = store.sequence(store.timestamp_feature)
        for what, second in (("first event", times.min()), ("last event", times.max())):
            yield what, as_date(int(second))
    for limit in _TRUNCATED_AT:
        cut = np.maximum(lengths - limit, 0)
        share = f"{(cut > 0).mean():.1%} of the users, {cut.sum() / lengths.sum():.1%} of the events"
        yield f"beyond a max_sequence_length of {limit}", share
    yield "users too short to train retrieval (fewer than 4 events)", int((lengths < 4).sum())
    for what in ("items_without_row", "forgotten_users"):
        if number := store.statistics.get(what):
            yield what.replace("_", " "), number


def _event_counts(store: SequenceStore, feature: str) -> np.ndarray:
    """Events of each value of an item, action or event feature, int64 [cardinality]."""
    counts = np.zeros(store.cardinality(feature), dtype=np.int64)
    for begin in range(0, store.num_events, _CHUNK):
        np.add.at(counts, store.sequence(feature)[begin : begin + _CHUNK], 1)
    return counts


def _quantiles(rows: Sequence[tuple[str, np.ndarray]]) -> str:
    shares = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
    names = ("", "min", "1 %", "10 %", "25 %", "median", "75 %", "90 %", "99 %", "max", "mean")
    found = [
        (what, *(int(value) for value in np.quantile(values, shares, method="nearest")), float(values.mean()))
        for what, values in rows
    ]
    return _table(names, found)


def _most_frequent(store: SequenceStore, of_items: np.ndarray) -> Iterator[str]:
    """Per feature its number of values, and the most frequent with their number of users, items or events."""
    raw, titles = store.raw_ids(store.item_feature), store.titles()
    names = raw if titles is None else [f"{raw_id} {title}" for raw_id, title in zip(raw, titles, strict=True)]
    yield f"{store.item_feature}, events ({len(of_items):,}): {_shown(names, of_items, 10)}"
    if (action := store.action_feature) is not None:
        yield f"{action}, events ({store.cardinality(action):,}): {_actions(store, action)}"
    for kind, features in (
        ("users", {name: np.bincount(store.context(name)) for name in store.contextual_features
                   if name != USER_FEATURE}),
        ("items", {name: np.bincount(store.item_values(name)[0]) for name in store.item_side_features}),
        ("events", {name: _event_counts(store, name) for name in store.event_features}),
    ):  # fmt: skip
        for name, counts in features.items():
            yield f"{name}, {kind} ({_values_of(store, name)}): {_shown(store.raw_ids(name), counts, 5)}"


def _actions(store: SequenceStore, action: str) -> str:
    counts = _event_counts(store, action)
    values = np.arange(len(counts))
    name = resolve_name(store.name)
    if name is not None and (bits := DATASETS[name].action_bits):
        return _shown(list(bits), np.array([counts[values & bit > 0].sum() for bit in bits.values()]), len(bits))
    labels = store.raw_ids(action) if store.features[action].has_vocab else values
    return _shown(labels, counts, _MOST_ACTIONS)


def _shown(values: Sequence[Any] | np.ndarray, counts: np.ndarray, most: int) -> str:
    top = [code for code in np.argsort(-counts, kind="stable")[:most] if counts[code]]
    return ", ".join(f"{values[code]}: {counts[code]:,}" for code in top)


def _values_of(store: SequenceStore, feature: str) -> str:
    if (found := store.features[feature].statistics) is not None:
        width = store.features[feature].width
        kind = "number" if width == 1 else f"vector of {width}"
        return f"{kind}, {found.missing:,} missing" if found.missing else kind
    different = f"{store.cardinality(feature):,}"
    if not store.features[feature].is_list:
        return different
    mean = len(store.item_values(feature)[0]) / store.cardinality(store.item_feature)
    return f"{different}, {mean:.1f} per item"


def _table(header: Sequence[str], rows: Any) -> str:
    """A Markdown table. Numbers get thousands separators; floats are rounded to two decimals."""
    formats = {float: ",.2f", int: ","}
    cells = [[_as_text(format(value, formats.get(type(value), ""))) for value in row] for row in rows]
    return tabulate(cells, [_as_text(name) for name in header], tablefmt="pipe", disable_numparse=True) + "\n"


def _as_code(text: str) -> str:
    """A Markdown block of raw data as it is, whose lines fit a terminal."""
    return textwrap.fill(printable(text, keep=""), 120, initial_indent=" " * 4, subsequent_indent=" " * 8)


def _as_text(text: str) -> str:
    """Escape raw data, so that it is one line of plain text in Markdown."""
    return "".join(
        f"\\{character}" if character in "\\`*[]|<>" else character for character in printable(text, keep="")
    )
