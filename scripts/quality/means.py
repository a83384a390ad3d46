"""Means over seeds with their standard errors, and how tables write them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MINUS = "−"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, from the sample variance; the error of a single value is nan."""
    if not values:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of the differences, seed by seed, over the seeds that both have."""
    return mean_and_error([value - reference[seed] for seed, value in values.items() if seed in reference])


def number(mean: float, error: float = math.nan, sign: bool = False) -> str:
    """``.1234 ± .0012``; without the error if it is nan, and empty if the mean is."""
    if math.isnan(mean):
        return ""
    text = f"{mean:+.4f}" if sign else f"{mean:.4f}"
    text = text.replace("0.", ".", 1) if abs(mean) < 1 else text
    text = text.replace("-", _MINUS)
    return text if math.isnan(error) else f"{text} ± {number(error)}"
