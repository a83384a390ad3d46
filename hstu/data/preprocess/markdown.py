"""The preprocessing report that people read: report.md with plots, next to the store it is about."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hstu.config.dataset_names import resolve_dataset_name
from hstu.data.preprocess.kuairand import ACTION_BITS
from hstu.data.preprocess.report import differences
from hstu.data.store import USER_FEATURE, SequenceStore

REPORT = "report.md"
_CHUNK = 1 << 22
_TOP = 10
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6b6b6b"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
}


def write_report(store: SequenceStore, folder: Path, truncated_at: Sequence[int] = (50, 200, 1000)) -> Path:
    """Writes report.md and its plots into ``folder``, which is made or replaced; returns the report's path.

    Reads every event once, in bounded memory but for a counter an item. ``truncated_at``: lengths for which
    the share of truncated histories is told.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside.chmod(0o755)
    try:
        lengths = np.diff(store.offsets())
        counts = _popularity(store)
        draw_lengths(lengths, aside / "lengths.png")
        draw_popularity(counts, aside / "popularity.png")
        sections = [
            f"# {store.name}\n",
            *_counts(store),
            *_published(store),
            *_rows(store, lengths, truncated_at),
            "## Histories\n\n![lengths of histories](lengths.png)\n",
            _quantiles("events a user", lengths),
            "## Items\n\n![popularity of items](popularity.png)\n",
            _quantiles("events an item", counts[counts > 0]),
            *_top_items(store, counts),
            *_actions(store),
            *_context(store),
            *_sources(store),
        ]
        (aside / REPORT).write_text("\n".join(sections), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / REPORT).is_file():  # else another process has just written the same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / REPORT


def repeated_events(store: SequenceStore) -> int:
    """Events that equal an earlier one of their user in time, item and action; 0 without times."""
    if store.timestamp_feature is None:
        return 0
    features = [store.timestamp_feature, store.item_feature]
    features += [store.action_feature] if store.action_feature else []
    return sum(_repeated_in(store, features, begin, end) for begin, end in _whole_users(store))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _counts(store: SequenceStore) -> list[str]:
    found = store.statistics
    rows = [(name, found[name]) for name in ("users", "items", "events")]
    rows.append(("events possible that did not happen (sparsity)", f"{found['sparsity']:.4%}"))
    if store.timestamp_feature is not None:
        times = store.sequence(store.timestamp_feature)
        spans = [(int(times[a:b].min()), int(times[a:b].max())) for a, b in _chunks(store.num_events)]
        first, last = min(span[0] for span in spans), max(span[1] for span in spans)
        rows.append(("first event", f"{_date(first)} UTC"))
        rows.append(("last event", f"{_date(last)} UTC"))
        rows.append(("days", (last - first) / 86_400))
    return ["## Counts\n", table(("", store.name), rows)]


def _published(store: SequenceStore) -> list[str]:
    published = store.statistics["published"]
    if not published:
        return []
    unlike = differences(store.statistics)
    rows = [
        (name, value, store.statistics[name], "**no**" if name in unlike else "yes")
        for name, value in published.items()
    ]
    verdict = "Not the complete data, or another release of it." if unlike else "All as published."
    return ["## Against the published statistics\n", table(("", "published", "here", "equal"), rows), verdict + "\n"]


def _rows(store: SequenceStore, lengths: np.ndarray, truncated_at: Sequence[int]) -> list[str]:
    skipped = store.statistics.get("skipped_rows", {})
    rows: list[tuple[str, object]] = [(f"skipped: {why}", number) for why, number in sorted(skipped.items())]
    rows.append(("skipped in all", sum(skipped.values())))
    rows.append(("repeated (same user, time, item and action; kept)", repeated_events(store)))
    for limit in truncated_at:
        cut = np.maximum(lengths - limit, 0)
        share = f"{(cut > 0).mean():.1%} of the users, {cut.sum() / lengths.sum():.1%} of the events"
        rows.append((f"beyond a max_sequence_length of {limit}", share))
    rows.append(("users too short to train retrieval (fewer than 4 events)", int((lengths < 4).sum())))
    return ["## Rows left out, and what training leaves out\n", table(("", "rows"), rows)]


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
    return [f"The {len(top)} most frequent:\n", table((store.item_feature, "title", "events", "share"), rows)]


def _actions(store: SequenceStore) -> list[str]:
    if store.action_feature is None:
        return []
    counts = _bincount(store, store.action_feature)
    values = np.arange(len(counts))
    if (resolve_dataset_name(store.name) or "").startswith("kuairand"):
        rows = [(signal, int(counts[values & bit > 0].sum())) for signal, bit in ACTION_BITS.items()]
    else:
        rows = [(str(value), int(counts[value])) for value in values[counts > 0][:50]]
    shares = [(name, number, f"{100 * number / store.num_events:.2f} %") for name, number in rows]
    return ["## Actions\n", table((store.action_feature, "events", "share"), shares)]


def _context(store: SequenceStore) -> list[str]:
    rows = []
    for name in store.contextual_features:
        if name == USER_FEATURE:
            continue
        counts = np.bincount(store.context(name), minlength=store.cardinality(name))
        raw = store.raw_ids(name)
        shown = ", ".join(f"{raw[code]} {counts[code]:,}" for code in np.argsort(-counts, kind="stable")[:5])
        rows.append((name, store.cardinality(name), shown))
    return ["## Contextual features\n", table(("", "values", "most frequent, users"), rows)] if rows else []


def _sources(store: SequenceStore) -> list[str]:
    rows = [(name, f"`{digest}`") for name, digest in store.sources.items()]
    return ["## Raw files\n", table(("file", "SHA-256"), rows), f"Made by `{store.command}`\n"]


def draw_lengths(lengths: np.ndarray, image: Path) -> None:
    """Histogram of the lengths of histories, on a logarithmic axis."""
    with _figure(image) as axes:
        edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 40).astype(int))
        axes.hist(lengths, bins=edges, color=_BLUE)
        axes.axvline(float(np.median(lengths)), color=_ORANGE)
        axes.annotate(
            f" median {np.median(lengths):,.0f}", (float(np.median(lengths)), 0.97), xycoords=("data", "axes fraction"),
            color=_ORANGE, va="top",
        )  # fmt: skip
        axes.set(xscale="log", xlabel="events of a user", ylabel="users", title="How long histories are")


def draw_popularity(counts: np.ndarray, image: Path) -> None:
    """Events of the items by rank, and the share of all events that the first ranks have."""
    ordered = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 400).astype(np.int64))
    with _figure(image) as axes:
        axes.plot(ranks, ordered[ranks - 1], color=_BLUE)
        half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
        axes.axvline(half, color=_ORANGE)
        axes.annotate(
            f" half of all events: {half:,} items, {half / len(ordered):.1%} ", (half, 0.03),
            xycoords=("data", "axes fraction"), color=_ORANGE, va="bottom",
            ha="right" if half > len(ordered) ** 0.5 else "left",
        )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="events", title="How popular items are")


class _figure:
    """An Axes to draw on; the PNG is written when the block ends."""

    def __init__(self, image: Path) -> None:
        # The figure is made without pyplot, which would keep global state and may want a display.
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._image, self._style = image, rc_context(_STYLE)
        self._style.__enter__()
        self._figure = Figure(figsize=(6.4, 3.2), dpi=100, layout="constrained")
        FigureCanvasAgg(self._figure)

    def __enter__(self) -> Any:
        return self._figure.subplots()

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._figure.savefig(self._image)
        finally:
            self._style.__exit__(None, None, None)


def _popularity(store: SequenceStore) -> np.ndarray:
    return _bincount(store, store.item_feature)


def _bincount(store: SequenceStore, feature: str) -> np.ndarray:
    counts = np.zeros(store.cardinality(feature), dtype=np.int64)
    for begin, end in _chunks(store.num_events):
        found, number = np.unique(store.sequence(feature)[begin:end], return_counts=True)
        counts[found] += number
    return counts


def _chunks(events: int) -> Iterable[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, events)) for begin in range(0, events, _CHUNK))


def _whole_users(store: SequenceStore) -> Iterable[tuple[int, int]]:
    """Ranges of events, of about _CHUNK events, that do not divide a user."""
    offsets = store.offsets()
    begin = 0
    while begin < store.num_events:
        end = int(offsets[min(int(np.searchsorted(offsets, begin + _CHUNK)), store.num_users)])
        yield begin, end
        begin = end


def _repeated_in(store: SequenceStore, features: Sequence[str], begin: int, end: int) -> int:
    values = [np.asarray(store.sequence(name)[begin:end]) for name in features]
    user = np.searchsorted(store.offsets(), np.arange(begin, end), side="right")
    tied = (np.diff(user) == 0) & (np.diff(values[0]) == 0)
    among = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
    keys = [user[among], *(value[among] for value in values)]
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        ordered = np.asarray(key)[order]
        same &= ordered[1:] == ordered[:-1]
    return int(same.sum())


def _date(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"second {seconds:,}"
