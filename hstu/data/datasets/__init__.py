"""The built-in datasets: one file per dataset family, collected here under the names that users write.

movielens.py, kuairand.py and amazon.py each hold everything about a family: where the data is published, the features,
the reader of the raw files. A new dataset of a known family is one more entry there; a new family is one more file,
listed in ``_FAMILIES``. own.py and own_*.py read users' own tables, spec.py and raw.py hold what all of them declare.
Anyone may import this registry: it needs neither NumPy nor torch nor DuckDB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hstu.data.datasets import amazon, kuairand, movielens
from hstu.data.datasets.spec import DatasetSpec

__all__ = ["DATASETS", "resolve_name"]

_FAMILIES = (movielens, kuairand, amazon)

DATASETS: Mapping[str, DatasetSpec] = {spec.name: spec for family in _FAMILIES for spec in family.DATASETS}
"""Canonical name → built-in dataset."""


def resolve_name(name: str) -> str | None:
    """The canonical name of a built-in dataset; None for any other name, which means the user's own data.

    Case and separators do not matter, and families have other spellings: ``ml-1m``, ``movielens-1m``, ``ML_1M``.
    """
    return _CANONICAL.get(_normalized(name))


def _normalized(name: str) -> str:
    bare = re.sub(r"[-_. ]", "", name.strip().lower())
    for family in _FAMILIES:
        for alias, prefix in family.ALIASES.items():
            bare = bare.replace(alias, prefix)
    return bare


_CANONICAL = {_normalized(name): name for name in DATASETS}
