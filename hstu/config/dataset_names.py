"""The names of the built-in datasets, in any of the spellings that users write."""

from __future__ import annotations

import re

BUILT_IN_DATASETS: tuple[str, ...] = ("ml-100k", "ml-1m", "ml-20m", "kuairand-pure", "kuairand-1k", "kuairand-27k")
"""Canonical names; their embedding tables are predefined."""


def resolve_dataset_name(name: str) -> str | None:
    """The canonical name of a built-in dataset, None for any other name (the user's own data).

    Case and separators do not matter, and MovieLens may be spelt out: ``ml-1m``, ``movielens-1m``, ``ML_1M``;
    ``KuaiRand-1K``, ``kuairand_1k``.
    """
    return _CANONICAL.get(_squeeze(name))


def _squeeze(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.strip().lower()).replace("movielens", "ml")


_CANONICAL = {_squeeze(name): name for name in BUILT_IN_DATASETS}
