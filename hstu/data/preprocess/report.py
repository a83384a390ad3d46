"""The report on a store that preprocessing prints."""

from __future__ import annotations

import numpy as np

from hstu.data.store.sequence_store import SequenceStore


def format_report(store: SequenceStore) -> str:
    """Counts of users, items, events and their features; what was left out; what differs from published counts."""
    found = store.statistics
    context = ", ".join(f"{name} ({store.cardinality(name):,})" for name in store.contextual_features) or "none"
    unused = store.cardinality(store.item_feature) - int(found["items"])
    also = f" and {unused:,} without events" if unused else ""
    sparsity = f"; sparsity {found['sparsity']:.4%}" if found["sparsity"] > 0 else ""  # not if events repeat
    lines = [
        f"{store.name}: {store}",
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
    for what in ("items_without_row", "forgotten_users"):
        if number := found.get(what):
            lines.append(f"  {what.replace('_', ' ')} {number:,}")
    if skipped := found.get("skipped_rows"):
        lines.append("  skipped rows: " + ", ".join(f"{why} {number:,}" for why, number in sorted(skipped.items())))
    if found["published"]:
        unlike = {name: value for name, value in found["published"].items() if abs(found[name] - value) >= 1}
        shown = "; ".join(f"{name} {found[name]:,.0f} instead of {unlike[name]:,}" for name in unlike)
        lines.append(
            f"  NOT the published statistics: {shown}. Not the complete data, or another release of it."
            if unlike
            else f"  as published: {', '.join(found['published'])}"
        )
    return "\n".join(lines)


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
