"""Features of events that follow from their times, so that no column of the data has to hold them."""

from __future__ import annotations

import numpy as np

from hstu.data.store_layout import TIME_FEATURES

_DAY_S, _HOUR_S = 86_400, 3_600


def time_codes(feature: str, events: np.ndarray, times: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 [n] codes of a time feature.

    events: int64 [n], places in ``times``. times: int64 [E] seconds since 1970, ascending within a user. offsets:
    int64 [U + 1]: user u's events are [offsets[u], offsets[u + 1]).
    """
    now = np.asarray(times[events], dtype=np.int64)
    if feature == "hour_of_day":
        return now // _HOUR_S % 24
    if feature == "day_of_week":
        return (now // _DAY_S + 3) % 7  # 1970 began on a Thursday
    most = (TIME_FEATURES["time_gap"].cardinality or 0) - 1
    is_first = offsets[np.searchsorted(offsets, events, side="right") - 1] == events
    gap = np.where(is_first, 0, now - times[np.maximum(events - 1, 0)])
    _, exponent = np.frexp(1 + gap)  # exact: 1 + gap = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return np.where(is_first, 0, np.minimum(exponent, most)).astype(np.int64)
