"""Command-line arguments and input files that the commands for trained models share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.base.errors import DataError
from hstu.checkpoint.find import is_choice
from hstu.config.cli import parse_time, read_ids
from hstu.config.problems import did_you_mean
from hstu.data.batches.jagged import ranges, run_starts
from hstu.data.datasets.spec import UNKNOWN
from hstu.serve.histories import stored_vocabulary
from hstu.serve.loaded import LoadedModel
from hstu.serve.runtime.files import Vocabulary

M = TypeVar("M", bound=LoadedModel)
_SHOWN = 10


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --run_dir, --ckpt, --partial and --data."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--partial", action="store_true", help="load what fits of the checkpoint, and report the rest")
    parser.add_argument("--data", type=Path, help="preprocessed data to apply the model to; default: that of the run")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --run_dir and --ckpt."""
    parser.add_argument("--run_dir", type=Path, help="directory of a run")
    parser.add_argument(
        "--ckpt",
        "--checkpoint",
        help="with --run_dir last, best or an iteration; or the path of a checkpoint, of a directory of them, or of an "
        "export. Default: the best by TrainerArgs.best_metric if the run has one, or else the last",
    )


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --users_file and --at."""
    parser.add_argument(
        "--users_file",
        help=".csv or .parquet file with a column user, or a file with one raw user id per line; default: all users",
    )
    parser.add_argument(
        "--at",
        type=parse_time,
        help="when the users ask, if the model reads it: now, seconds since 1970, or a date; default: at the newest "
        "event of each",
    )


def require_model(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a usage error if neither --run_dir nor the path of a checkpoint is given."""
    if options.run_dir is None and options.ckpt is None:
        parser.error("give --run_dir, --ckpt or both")
    if options.run_dir is None and is_choice(options.ckpt):
        parser.error(f"--ckpt {options.ckpt} needs --run_dir; or give the path of a checkpoint")


def load_model(cls: type[M], options: argparse.Namespace) -> M:
    """Load the model that the arguments name, and print on standard error what did not fit. Collective."""
    path, strict = options.run_dir or options.ckpt, False if options.partial else None
    loaded = cls.load(path, options.ckpt, strict=strict, data=options.data)
    note(loaded, *loaded.report)
    return loaded


def note(loaded: LoadedModel, *lines: str) -> None:
    """Print notes on standard error, on the main rank only."""
    if loaded.mesh.is_main:
        for line in lines:
            print(f"note: {line}", file=sys.stderr)


def note_unknown(loaded: LoadedModel, file: str, unknown: Mapping[str, Sequence[Any]]) -> None:
    """Print the ids of a file that the data lacks. ``unknown``: column → ids."""
    for column, ids in unknown.items():
        if ids:
            note(loaded, f"{file}: {len(ids)} unknown {column}(s) left out: {shown(ids)}")


def shown(values: Sequence[Any]) -> str:
    """Format the first few values for a message."""
    return ", ".join(map(repr, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")


@dataclass(frozen=True)
class Candidates:
    """C candidates of U users, grouped by user."""

    users: np.ndarray
    """int64 [U]: store rows of the users, in the order of their first candidates."""
    counts: np.ndarray
    """int64 [U]: candidates of each user, at least 1."""
    items: np.ndarray
    """int64 [C]: item codes."""
    values: Mapping[str, np.ndarray]
    """Event feature → stored values, [C]."""

    def of_users(self, users: np.ndarray) -> Candidates:
        """The candidates of ``users`` in their order. Users without candidates are left out."""
        places = pd.Index(self.users).get_indexer(users)
        chosen = places[places >= 0]
        rows = ranges(run_starts(self.counts)[chosen], self.counts[chosen])
        values = {name: values[rows] for name, values in self.values.items()}
        return Candidates(self.users[chosen], self.counts[chosen], self.items[rows], values)


def read_codes(loaded: LoadedModel, file: str, column: str, vocabulary: Vocabulary) -> np.ndarray:
    """The codes, int64, of the known ids in a file. Prints unknown ids. Raises DataError if no id is known."""
    is_table = file.endswith((".csv", ".parquet"))
    ids = _read_table(file, (column,))[column] if is_table else pd.Series(read_ids(file), dtype=object)
    codes, unknown = _encode(ids, vocabulary)
    if not (codes >= 0).any():
        raise DataError(f"{file}: the data knows no {column} of this file: {shown(unknown)}")
    note_unknown(loaded, file, {column: unknown})
    return codes[codes >= 0]


def users_of_file(loaded: LoadedModel, file: str | None) -> np.ndarray:
    """Distinct store rows, int64, of the users in a file (None: of all users). Prints unknown users."""
    if file is None:
        return np.arange(loaded.store.num_users)
    return np.asarray(pd.unique(read_codes(loaded, file, "user", loaded.users)))


def read_candidates(loaded: LoadedModel, file: str, features: Sequence[str]) -> Candidates:
    """Read candidates from a .csv or .parquet file with the columns user, item and ``features``. Prints unknown users
    and items, which are left out, and unknown values, which count as missing. Raises DataError."""
    table = _read_table(file, ("user", "item", *features))
    users, unknown_users = _encode(table["user"], loaded.users)
    items, unknown_items = _encode(table["item"], loaded.items)
    known = np.flatnonzero((users >= 0) & (items >= 0))
    if not len(known):
        raise DataError(f"{file}: the data knows no pair of user and item of this file")
    note_unknown(loaded, file, {"user": unknown_users, "item": unknown_items})
    places, distinct = pd.factorize(users[known])
    rows = known[np.argsort(places, kind="stable")]
    values = {name: _event_values(loaded, file, name, table[name])[rows] for name in features}
    return Candidates(distinct, np.bincount(places), items[rows], values)


def _read_table(file: str, columns: Iterable[str]) -> pd.DataFrame:
    """Read columns of a .csv file as strings, or of a .parquet file. Raises DataError."""
    wanted, is_csv = list(columns), file.endswith(".csv")
    try:
        names = [*pd.read_csv(file, nrows=0)] if is_csv else pq.read_schema(file).names
        for name in wanted:
            if name not in names:
                raise DataError(f"{file} has no column {name!r}; it has {', '.join(names)}{did_you_mean(name, names)}")
        if is_csv:
            table = pd.read_csv(file, usecols=wanted, dtype=str, keep_default_na=False, na_values=[""])
        else:
            table = pq.read_table(file, columns=wanted).to_pandas(integer_object_nulls=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    for name in ("user", "item"):
        if name in wanted and table[name].hasnans:
            raise DataError(f"{file}: {table[name].isna().sum()} row(s) have no {name}")
    return table


def _encode(ids: pd.Series[Any], vocabulary: Vocabulary) -> tuple[np.ndarray, list[Any]]:
    """Look up raw ids. Returns (codes, int64 [n], -1 if unknown; the distinct unknown ids)."""
    places, distinct = pd.factorize(ids)
    values = list(distinct.tolist())
    codes = vocabulary.rows(values).numpy()
    return codes[places], [value for value, code in zip(values, codes, strict=True) if code < 0]


def _event_values(loaded: LoadedModel, file: str, name: str, column: pd.Series[Any]) -> np.ndarray:
    """Stored values of an event feature: int32 codes, or float32 with NaN for missing."""
    if loaded.store.feature(name).role == "event_number":
        try:
            return np.asarray(pd.to_numeric(column), dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: column {name!r} must have numbers: {error}") from error
    vocabulary = stored_vocabulary(loaded.store, name)
    codes, unknown = _encode(column.fillna(UNKNOWN).astype(str), vocabulary)
    missing = int(vocabulary.places([UNKNOWN])[0])
    if unknown and missing < 0:
        known = f"it has {loaded.encoder.text_of(name)}"
        raise DataError(f"{file}: column {name!r} has values that the data does not know: {shown(unknown)}; {known}")
    if unknown:
        note(loaded, f"{file}: {len(unknown)} unknown value(s) of {name}, taken for missing: {shown(unknown)}")
    return np.where(codes < 0, missing, codes).astype(np.int32)
