"""How well ratings are predicted: AUC of "liked", by the number of earlier ratings, and how it depends on the users."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd

LIKED = 4
"""The least number of stars that counts as liked."""
PARTS = {"1-20": (0, 20), "21-50": (20, 50), "51-100": (50, 100), "101+": (100, sys.maxsize)}
"""Parts of a sample, by the number of its earlier ratings."""


def in_parts(place: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """For each part, which labels are in it: bool [M]. place: number of earlier ratings in the sample, int64 [M]."""
    for name, (first, end) in PARTS.items():
        yield name, (first <= place) & (place < end)


def influences(scores: np.ndarray, is_liked: np.ndarray, users: np.ndarray) -> pd.Series:
    """What each user contributes to AUC − its mean, by user. All arrays: [M].

    The sum of squares estimates the variance of AUC over users (Obuchowski, Biometrics 53, 1997: clustered data), and
    that of the differences of two methods the variance of their difference.
    """
    ranks = pd.Series(scores).rank()
    above = np.zeros(len(scores))  # the share of the other class that is on the right side, less AUC
    for here, sign in ((is_liked, 1), (~is_liked, -1)):
        shares = (ranks[here] - ranks[here].rank()) / (~here).sum()
        above[here] = sign * (shares - shares.mean()) / here.sum()
    return pd.Series(above, name="influence").groupby(users).sum().rename_axis("user")
