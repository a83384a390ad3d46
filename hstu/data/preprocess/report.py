"""What preprocessing found: statistics for meta.json and a short report for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hstu.data.store import SequenceStore


def statistics_of(lengths: np.ndarray, num_items: int, published: Mapping[str, float]) -> dict[str, Any]:
    """Counts, lengths per user, sparsity in [0, 1]; ``published`` are the figures of the complete data."""
    events = int(lengths.sum())
    return {
        "users": len(lengths),
        "items": num_items,
        "events": events,
        "length_max": int(lengths.max()),
        "length_min": int(lengths.min()),
        "length_mean": events / len(lengths),
        "length_median": float(np.median(lengths)),
        "sparsity": 1 - events / (len(lengths) * num_items),
        "published": dict(published),
    }


def differences(statistics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Statistic -> (found, published) where they differ by more than the rounding to an integer."""
    return {
        name: (statistics[name], published)
        for name, published in statistics["published"].items()
        if abs(statistics[name] - published) >= 1
    }


def format_report(store: SequenceStore) -> str:
    """The report that the terminal shows, a few lines."""
    found = store.statistics
    context = ", ".join(f"{name} ({store.cardinality(name):,})" for name in store.contextual_features) or "none"
    lines = [
        f"{store.name}: {store.path}",
        f"  users {found['users']:,}, items {found['items']:,}, events {found['events']:,}",
        f"  events a user: max {found['length_max']:,}, min {found['length_min']:,}, "
        f"mean {found['length_mean']:,.1f}, median {found['length_median']:,.0f}; sparsity {found['sparsity']:.4%}",
        f"  item {store.item_feature}, action {store.action_feature or 'none'}, "
        f"time {store.timestamp_feature or 'none (file order)'}, context {context}",
    ]
    if found["published"]:
        unlike = differences(found)
        shown = "; ".join(f"{name} {ours:,.0f} instead of {theirs:,}" for name, (ours, theirs) in unlike.items())
        lines.append(
            f"  NOT the published statistics: {shown}. Not the complete data, or another release of it."
            if unlike
            else f"  as published: {', '.join(found['published'])}"
        )
    return "\n".join(lines)
