"""The built-in datasets by name, and the readers of users' own tables.

movielens.py, kuairand.py and amazon.py each hold a dataset family: source, features and reader of the raw files. Add a
dataset as an entry there, and a family as a file listed in ``_FAMILIES``. own.py reads users' own tables, with the
options in own_columns.py, of which recbole.py finds some by itself; spec.py and raw.py define what all datasets
declare. The registry imports neither NumPy nor torch nor DuckDB.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from hstu.base import remote
from hstu.config.args import DatasetArgs
from hstu.data.datasets import amazon, kuairand, movielens
from hstu.data.datasets.spec import DatasetSpec

_FAMILIES = (movielens, kuairand, amazon)

DATASETS: Mapping[str, DatasetSpec] = {spec.name: spec for family in _FAMILIES for spec in family.DATASETS}
"""Canonical name → built-in dataset."""


def resolve_name(name: str) -> str | None:
    """Canonical name of a built-in dataset, else None. Accepts aliases in any case: ``movielens-1m``, ``ML_1M``."""
    return _CANONICAL.get(_normalized(name))


def store_path(args: DatasetArgs) -> Path:
    """Local path of the preprocessed data of ``args``: dataset_path, of which a URL is staged, or tmp_data/<name>."""
    name = resolve_name(args.dataset_name) or args.dataset_name
    return remote.stage(args.dataset_path or Path("tmp_data") / name, remote.Cache.of(args), root_only=True)


def _normalized(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.strip().lower()).replace("movielens", "ml").replace("amzn", "amazon")


_CANONICAL = {_normalized(name): name for name in DATASETS}
