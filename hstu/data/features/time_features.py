"""Features of events that follow from their times, so that no column of the data has to hold them."""

from __future__ import annotations

import numpy as np

from hstu.data.store.layout import TIME_FEATURES

_DAY_S, _HOUR_S = 86_400, 3_600


def time_codes(
    feature: str, events: np.ndarray, times: np.ndarray, offsets: np.ndarray, first_times: np.ndarray | None = None
) -> np.ndarray:
    """int64 [n] codes of a time feature.

    events: int64 [n], places in ``times``. times: int64 [E] seconds since 1970, ascending within a user. offsets:
    int64 [U + 1]: user u's events are [offsets[u], offsets[u + 1]). first_times: int64 [n], when the item of each event
    had its first event, for item_age.
    """
    now = np.asarray(times[events], dtype=np.int64)
    if feature == "item_age":
        assert first_times is not None
        return age_codes(now - first_times)
    if feature != "time_gap":
        return calendar_codes(feature, now)
    is_first = offsets[np.searchsorted(offsets, events, side="right") - 1] == events
    return np.where(is_first, 0, gap_codes(np.where(is_first, 0, now - times[np.maximum(events - 1, 0)])))


def calendar_codes(feature: str, times: np.ndarray) -> np.ndarray:
    """int64 [n] codes of hour_of_day or day_of_week. times: int64 [n], seconds since 1970."""
    if feature == "hour_of_day":
        return times // _HOUR_S % 24
    return (times // _DAY_S + 3) % 7  # 1970 began on a Thursday


def gap_codes(seconds: np.ndarray) -> np.ndarray:
    """int64 [n] codes of time_gap, for integers >= 0 of seconds since the user's event before."""
    most = (TIME_FEATURES["time_gap"].cardinality or 0) - 1
    _, exponent = np.frexp(1 + seconds)  # exact: 1 + seconds = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return np.minimum(exponent, most).astype(np.int64)


def age_codes(seconds: np.ndarray) -> np.ndarray:
    """int64 [n] codes of item_age, for integers of seconds since the item's first event. Before that event: 0."""
    most = (TIME_FEATURES["item_age"].cardinality or 0) - 1
    _, exponent = np.frexp(1 + np.maximum(seconds, 0))
    return np.minimum(exponent - 1, most).astype(np.int64)
