"""Event features that are computed from times, without a column in the data."""

from __future__ import annotations

import numpy as np

from hstu.data.store.layout import TIME_FEATURES

NO_EVENT = -1
"""Stands for the time of the event before a user's first event."""


def time_codes(feature: str, now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """int64 [n] codes of a time feature. now: int64 [n], seconds since 1970. before: int64 [n], the time of the user's
    previous event, or NO_EVENT."""
    if feature == "hour_of_day":
        return now // 3_600 % 24
    if feature == "day_of_week":
        return (now // 86_400 + 3) % 7  # 1970 began on a Thursday
    is_first = before == NO_EVENT
    _, exponent = np.frexp(1 + np.where(is_first, 0, now - before))  # exact: mantissa * 2^exponent, 0.5 <= mantissa < 1
    most = (TIME_FEATURES["time_gap"].cardinality or 0) - 1
    return np.where(is_first, 0, np.minimum(exponent, most)).astype(np.int64)
