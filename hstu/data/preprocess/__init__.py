"""Raw files -> sequence store: ``preprocess`` for the built-in datasets, ``import_interactions`` for one's own."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path

from hstu.config.errors import ConfigError, DataError
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.download import by_hand, locate_raw, obtain_raw
from hstu.data.preprocess import kuairand, movielens
from hstu.data.preprocess.bad_rows import Policy
from hstu.data.preprocess.build import build_store
from hstu.data.preprocess.interactions import InteractionColumns, interactions
from hstu.data.preprocess.work import BuildOptions
from hstu.data.store import SequenceStore

__all__ = ["InteractionColumns", "import_interactions", "preprocess"]

_log = logging.getLogger(__name__)
_READERS = {**movielens.READERS, **kuairand.READERS}
_SCRIPT = ("python", "scripts/preprocess_dataset.py")
DATA_DIRECTORY = Path("tmp_data")
"""Where stores and, under raw/, downloads go by default, relative to where the command runs."""


def preprocess(
    name: str,
    *,
    raw_path: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    memory_limit: str = "4GB",
    bad_row_policy: Policy = "raise",
    max_bad_rows: int = 1000,
) -> Path:
    """Makes the store of a built-in dataset, in any spelling of its name, and returns its path.

    Raw files come from ``raw_path``; without it from tmp_data/raw/<name>, downloaded if need be. An existing good
    store is left alone unless ``force``. ``bad_row_policy`` and ``max_bad_rows``: see bad_rows.py.
    Raises ConfigError for an unknown name, DataError for missing or bad files.
    """
    canonical = resolve_name(name)
    if canonical is None:
        raise ConfigError(
            f"dataset_name {name!r} is not built in ({', '.join(DATASETS)}); for your own data give also "
            "--interactions FILE --user COLUMN --item COLUMN"
        )
    spec = DATASETS[canonical]
    target = Path(output) if output else DATA_DIRECTORY / canonical
    if not force and _is_good(target):
        return target
    if raw_path is None:
        raw_format, files = obtain_raw(spec, DATA_DIRECTORY / "raw" / canonical)
    elif located := locate_raw(spec, Path(raw_path)):
        raw_format, files = located
    else:
        needed = " or ".join(", ".join(raw_format.files) for raw_format in spec.raw_formats)
        raise DataError(f"{raw_path} does not hold the files of {canonical}: {needed}. {by_hand(spec, Path(raw_path))}")
    skipping = bad_row_policy if bad_row_policy != "raise" else None
    command = _command(dataset_name=canonical, raw_path=raw_path, output=target, bad_row_policy=skipping)
    options = BuildOptions(
        name=canonical,
        output=target,
        command=command,
        memory_limit=memory_limit,
        bad_row_policy=bad_row_policy,
        max_bad_rows=max_bad_rows,
    )
    return build_store(_READERS[raw_format.reader](files), spec.schema, options, spec.published)


def import_interactions(
    name: str,
    columns: InteractionColumns,
    *,
    output: str | Path | None = None,
    force: bool = False,
    memory_limit: str = "4GB",
    bad_row_policy: Policy = "raise",
    max_bad_rows: int = 1000,
) -> Path:
    """Makes the store of one's own table and returns its path; otherwise as preprocess."""
    if resolve_name(name) is not None:
        raise ConfigError(f"dataset_name {name!r} is a built-in dataset; give your own data another name")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"dataset_name {name!r}: allowed are letters, digits, '_', '-' and '.', as it names a directory"
        )
    target = Path(output) if output else DATA_DIRECTORY / name
    if not force and _is_good(target):
        return target
    command = _command(
        dataset_name=name,
        interactions=columns.interactions,
        user=columns.user,
        item=columns.item,
        action=columns.action,
        time=columns.time,
        context=columns.context,
        context_columns=",".join(columns.context_columns) or None,
        output=target,
        bad_row_policy=bad_row_policy if bad_row_policy != "raise" else None,
    )
    options = BuildOptions(
        name=name,
        output=target,
        command=command,
        memory_limit=memory_limit,
        bad_row_policy=bad_row_policy,
        max_bad_rows=max_bad_rows,
    )
    return build_store(interactions(columns), columns.schema(), options, {})


def _is_good(target: Path) -> bool:
    try:
        store = SequenceStore.open(target)
    except DataError:
        return False
    _log.warning("%s exists and is left alone; --force makes it anew. It was made with: %s", target, store.command)
    return True


def _command(**arguments: object) -> str:
    given = [(f"--{name}", str(value)) for name, value in arguments.items() if value is not None]
    return shlex.join([*_SCRIPT, *(word for pair in given for word in pair)])
