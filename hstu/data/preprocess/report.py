"""What preprocessing found: lines for the terminal, and a report with plots."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from hstu.base.errors import DataError, printable
from hstu.base.figure import COLOURS, open_figure
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess.statistics import chunks, differences, equal_times, event_counts, repeated_events
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore

REPORT = "report.md"
_FILES = (REPORT, "lengths.png", "popularity.png")
_LAST_LINE = "Made by"
_TOP = 10
_TRUNCATED_AT = (50, 200, 1000)
"""Values of max_sequence_length for which the report shows how much they cut off."""
_BLUE, _ORANGE = COLOURS[:2]
_FIGURE: tuple[tuple[float, float], int] = ((6.4, 3.2), 100)
"""Inches and dots per inch."""


def format_report(store: SequenceStore) -> str:
    """The short report for the terminal."""
    found = store.statistics
    context = ", ".join(f"{name} ({store.cardinality(name):,})" for name in store.contextual_features) or "none"
    also = f" and {unused:,} without events" if (unused := _items_without_events(store)) else ""
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
        lines.append(f"  {_requests_in_words(store)}")
    if events := store.events_by_split():
        shown = ", ".join(f"{split} {number:,}" for split, number in events.items())
        lines.append(f"  split {store.split}, in events: {shown}")
    if found["published"]:
        unlike = differences(found)
        shown = "; ".join(f"{name} {ours:,.0f} instead of {theirs:,}" for name, (ours, theirs) in unlike.items())
        lines.append(
            f"  NOT the published statistics: {shown}. Not the complete data, or another release of it."
            if unlike
            else f"  as published: {', '.join(found['published'])}"
        )
    return "\n".join(lines)


def write_report(store: SequenceStore, folder: Path) -> Path:
    """Writes report.md and plots into ``folder``, which is created or replaced; returns report.md.

    Raises DataError where the folder holds something other than a report.
    Reads every event once. Memory is bounded, except for one counter per item.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside.chmod(0o755)
    try:
        lengths = np.diff(store.offsets())
        counts = event_counts(store, store.item_feature)
        draw_lengths(lengths, aside / "lengths.png")
        draw_popularity(counts, aside / "popularity.png")
        parts = [
            heading(store.name, level=1),
            *_counts(store),
            *_published(store),
            *_splits(store),
            *_rows(store, lengths),
            heading("Histories"),
            "![lengths of histories](lengths.png)\n",
            _quantiles("events per user", lengths),
            heading("Items"),
            "![popularity of items](popularity.png)\n",
            _quantiles("events per item", counts[counts > 0]),
            *_top_items(store, counts),
            *_actions(store),
            *_context(store),
            *_item_features(store),
            *_event_features(store),
            *_numbers(store),
            *_requests(store),
            *_sources(store),
        ]
        (aside / REPORT).write_text("\n".join(parts), encoding="utf-8")
        check_report_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / REPORT).is_file():  # else another process has just written the same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / REPORT


def check_report_folder(folder: Path) -> None:
    """Raises DataError where a report would replace something other than a report."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else ["a file"]
    report = folder / REPORT
    is_report = report.is_file() and f"{_LAST_LINE} `".encode() in report.read_bytes() and set(names) <= set(_FILES)
    if names and not is_report:
        raise DataError(
            f"the report would replace {folder}, which is none ({', '.join(sorted(names)[:5])}); move it away, or add "
            "--no_report"
        )


def _counts(store: SequenceStore) -> list[str]:
    found = store.statistics
    rows = [(name, found[name]) for name in ("users", "items", "events")]
    if unused := _items_without_events(store):
        rows.append(("further items, without events", unused))
    if found["sparsity"] > 0:  # not if users repeat events
        rows.append(("events possible that did not happen (sparsity)", f"{found['sparsity']:.4%}"))
    if store.timestamp_feature is not None:
        times = store.sequence(store.timestamp_feature)
        spans = [(int(times[a:b].min()), int(times[a:b].max())) for a, b in chunks(store.num_events)]
        first, last = min(span[0] for span in spans), max(span[1] for span in spans)
        rows.append(("first event", f"{_date(first)} UTC"))
        rows.append(("last event", f"{_date(last)} UTC"))
        rows.append(("days", (last - first) / 86_400))
    return [heading("Counts"), table(("", store.name), rows)]


def _items_without_events(store: SequenceStore) -> int:
    return store.cardinality(store.item_feature) - int(store.statistics["items"])


def _published(store: SequenceStore) -> list[str]:
    published = store.statistics["published"]
    if not published:
        return []
    unlike = differences(store.statistics)
    rows = [
        (name, value, store.statistics[name], "no" if name in unlike else "yes") for name, value in published.items()
    ]
    verdict = "Not the complete data, or another release of it." if unlike else "All as published."
    compared = table(("", "published", "here", "equal"), rows)
    return [heading("Against the published statistics"), compared, paragraph(verdict)]


def _splits(store: SequenceStore) -> list[str]:
    if store.split is None:
        return []
    first, (valid, test) = store.offsets()[:-1], (store.held_out("valid")[0], store.held_out("test")[0])
    bounds = {"train": (first, valid), "valid": (valid, test), "test": (test, store.offsets()[1:])}
    rows = []
    for split, events in store.events_by_split().items():
        begin, end = bounds[split]
        has_events = end > begin
        users, new = int(has_events.sum()), int((has_events & (begin == first)).sum())
        rows.append((split, events, f"{events / store.num_events:.1%}", users, "" if split == "train" else new))
    header = (store.split, "events", "share", "users", "of which without an earlier event")
    return [heading("Splits"), table(header, rows)]


def _rows(store: SequenceStore, lengths: np.ndarray) -> list[str]:
    skipped = store.statistics.get("skipped_rows", {})
    rows: list[tuple[str, object]] = [(f"skipped: {why}", number) for why, number in sorted(skipped.items())]
    rows.append(("skipped in all", sum(skipped.values())))
    rows.append(("repeated (same user, time, item and action; kept)", repeated_events(store)))
    if store.timestamp_feature is not None:
        tied, users = equal_times(store)
        rows.append(("at the second of the event before, and therefore in the order of the file", tied))
        rows.append(("users whose last two events are of one second, so that the file decides which is last", users))
    for limit in _TRUNCATED_AT:
        cut = np.maximum(lengths - limit, 0)
        share = f"{(cut > 0).mean():.1%} of the users, {cut.sum() / lengths.sum():.1%} of the events"
        rows.append((f"beyond a max_sequence_length of {limit}", share))
    rows.append(("users too short to train retrieval (fewer than 4 events)", int((lengths < 4).sum())))
    return [heading("Rows left out, and what training leaves out"), table(("", "rows"), rows)]


def _quantiles(what: str, values: np.ndarray) -> str:
    shares = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
    names = ("min", "1 %", "10 %", "25 %", "median", "75 %", "90 %", "99 %", "max", "mean")
    found = [*(int(value) for value in np.quantile(values, shares, method="nearest")), float(values.mean())]
    return table((what, *names), [("", *found)])


def _top_items(store: SequenceStore, counts: np.ndarray) -> list[str]:
    top = np.argsort(-counts, kind="stable")[:_TOP]
    raw, titles = store.raw_ids(store.item_feature), store.titles()
    share = 100 * counts / store.num_events
    rows = [
        (raw[code], "" if titles is None else titles[code], int(counts[code]), f"{share[code]:.2f} %") for code in top
    ]
    most_frequent = table((store.item_feature, "title", "events", "share"), rows)
    return [paragraph(f"The {len(top)} most frequent:"), most_frequent]


def _actions(store: SequenceStore) -> list[str]:
    if store.action_feature is None:
        return []
    counts = event_counts(store, store.action_feature)
    values = np.arange(len(counts))
    name = resolve_name(store.name)
    if name is not None and (bits := DATASETS[name].action_bits):
        rows = [(signal, int(counts[values & bit > 0].sum())) for signal, bit in bits.items()]
    elif store.features[store.action_feature].has_vocab:
        labels = store.raw_ids(store.action_feature)
        rows = [(f"{value} {label}", int(number)) for value, label, number in zip(values, labels, counts, strict=True)]
    else:
        rows = [(str(value), int(counts[value])) for value in values[counts > 0][:50]]
    shares = [(name, number, f"{100 * number / store.num_events:.2f} %") for name, number in rows]
    return [heading("Actions"), table((store.action_feature, "events", "share"), shares)]


def _context(store: SequenceStore) -> list[str]:
    rows = [
        (name, store.cardinality(name), _most_frequent(store, name, np.bincount(store.context(name))))
        for name in store.contextual_features
        if name != USER_FEATURE
    ]
    return [heading("Contextual features"), table(("", "values", "most frequent, users"), rows)] if rows else []


def _item_features(store: SequenceStore) -> list[str]:
    rows = [
        (name, _values_of(store, name), _most_frequent(store, name, np.bincount(store.item_values(name)[0])))
        for name in store.item_side_features
    ]
    if not rows:
        return []
    parts: list[str] = [heading("Features of items"), table(("", "values", "most frequent, items"), rows)]
    counted = {
        "items_without_row": f"Items without a row, whose features are {UNKNOWN!r}",
        "items_with_different_rows": "Items of which several rows differ, so that the first counts",
    }
    found = [(text, store.statistics[name]) for name, text in counted.items() if store.statistics.get(name)]
    return [*parts, table(("", "items"), found)] if found else parts


def _event_features(store: SequenceStore) -> list[str]:
    rows = [
        (name, _values_of(store, name), _most_frequent(store, name, event_counts(store, name)))
        for name in store.event_features
    ]
    return [heading("Features of events"), table(("", "values", "most frequent, events"), rows)] if rows else []


def _numbers(store: SequenceStore) -> list[str]:
    """Vectors have the mean of their components' means, and of their deviations."""
    rows = []
    for name in (*store.item_number_features, *store.event_number_features):
        meta = store.features[name]
        assert meta.statistics is not None
        found, of = meta.statistics, "items" if meta.role == "item_number" else "events"
        shown = [""] * 5
        if found.quantiles:
            places = np.linspace(0, len(found.quantiles) - 1, 5).astype(int)
            shown = [f"{found.quantiles[place]:.6g}" for place in places]
        moments = [f"{float(np.mean(values)):.6g}" for values in (found.mean, found.std)]
        rows.append((name, of, meta.width, found.missing, *shown, *moments))
    header = ("", "of", "width", "missing", "min", "25 %", "median", "75 %", "max", "mean", "deviation")
    return [heading("Numbers"), table(header, rows)] if rows else []


def _requests_in_words(store: SequenceStore) -> str:
    requests, left_out = store.requests(), store.statistics.get("requests_left_out", 0)
    sizes, users = requests.sizes, len(np.unique(requests.users))
    return (
        f"requests {len(requests):,} of {users:,} users; candidates {store.num_candidates:,}, per request max "
        f"{sizes.max():,}, mean {sizes.mean():,.1f}"
        + (f"; left out {left_out:,} requests without an event of the user before" if left_out else "")
    )


def _requests(store: SequenceStore) -> list[str]:
    if not store.num_requests:
        return []
    requests = store.requests()
    parts: list[str] = [heading("Requests"), paragraph(f"{_requests_in_words(store)}.")]
    parts.append(_quantiles("candidates per request", requests.sizes))
    parts.append(_quantiles("events before a request", requests.history_ends - store.offsets()[requests.users]))
    if store.action_feature is not None:
        counts = np.bincount(store.candidates(store.action_feature))
        share = 100 / store.num_candidates
        rows = [(str(value), int(counts[value]), f"{counts[value] * share:.2f} %") for value in np.flatnonzero(counts)]
        parts.append(table((store.action_feature, "candidates", "share"), rows[:50]))
    return parts


def _values_of(store: SequenceStore, feature: str) -> str:
    """How many values a feature of items or events has, and a list on average."""
    if (found := store.features[feature].statistics) is not None:
        width = store.features[feature].width
        kind = "number" if width == 1 else f"vector of {width}"
        return f"{kind}, {found.missing:,} missing" if found.missing else kind
    different = f"{store.cardinality(feature):,}"
    if not store.features[feature].is_list:
        return different
    mean = len(store.item_values(feature)[0]) / store.cardinality(store.item_feature)
    return f"{different}, {mean:.1f} per item"


def _most_frequent(store: SequenceStore, feature: str, counts: np.ndarray) -> str:
    raw = store.raw_ids(feature)
    return ", ".join(f"{raw[code]} {counts[code]:,}" for code in np.argsort(-counts, kind="stable")[:5])


def _sources(store: SequenceStore) -> list[str]:
    files = table(("file", "SHA-256"), list(store.sources.items()))
    return [heading("Raw files"), files, _made_by(store.command or "a program")]


def draw_lengths(lengths: np.ndarray, image: Path) -> None:
    """A histogram of the lengths of histories, on a logarithmic axis."""
    with open_figure(image, *_FIGURE) as figure:
        axes = figure.subplots()
        edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 40).astype(int))
        axes.hist(lengths, bins=edges.tolist(), color=_BLUE)
        axes.axvline(float(np.median(lengths)), color=_ORANGE)
        axes.annotate(
            f" median {np.median(lengths):,.0f}", (float(np.median(lengths)), 0.97), xycoords=("data", "axes fraction"),
            color=_ORANGE, va="top",
        )  # fmt: skip
        axes.set(xscale="log", xlabel="events of a user", ylabel="users", title="How long histories are")


def draw_popularity(counts: np.ndarray, image: Path) -> None:
    """Events per item by rank, and how many items have half of all events."""
    ordered = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 400).astype(np.int64))
    with open_figure(image, *_FIGURE) as figure:
        axes = figure.subplots()
        axes.plot(ranks, ordered[ranks - 1], color=_BLUE)
        half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
        axes.axvline(half, color=_ORANGE)
        axes.annotate(
            f" half of all events: {half:,} items, {half / len(ordered):.1%} ", (half, 0.03),
            xycoords=("data", "axes fraction"), color=_ORANGE, va="bottom",
            ha="right" if half > len(ordered) ** 0.5 else "left",
        )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="events", title="How popular items are")


def _date(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"second {seconds:,}"


def heading(text: str, level: int = 2) -> str:
    """A heading in Markdown; ``level`` 1 is the title of the document."""
    return f"{'#' * level} {_as_text(text)}\n"


def paragraph(text: str) -> str:
    """A sentence in Markdown."""
    return f"{_as_text(text)}\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown. Numbers get thousands separators; floats are rounded to two places."""
    cells = [[_as_text(_cell(value)) for value in row] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def _made_by(command: str) -> str:
    code = printable(command, keep="").replace("`", "'")
    return f"{_LAST_LINE} `{code}`\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _as_text(text: str) -> str:
    """Raw data as it is, not as markup."""
    return re.sub(r"[|`*\[\]\\]", r"\\\g<0>", html.escape(printable(text, keep=""), quote=False))
