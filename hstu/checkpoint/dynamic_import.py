"""Dynamic tables from Parquet files, as ``dynamic_parquet`` or another tool has written them, into a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hstu.checkpoint.dynamic import (
    DYNAMIC_FILES,
    as_plain,
    rank_of,
    read_plain,
    read_table,
    times_file,
    write_dynamic_tables,
)
from hstu.checkpoint.dynamic_parquet import METADATA, STATE, raw_ids_of_table
from hstu.checkpoint.manifest import describe_files, file_problems, read_manifest, write_manifest
from hstu.checkpoint.tensor_files import CONSOLIDATED
from hstu.config.errors import DataError
from hstu.parallel.dynamic.content import TableContent, merged
from hstu.parallel.dynamic.slots import MAX_STEP, score
from hstu.parallel.dynamic.times import last_of_all


def import_table(checkpoint: Path, table: str, files: Sequence[Path], output: Path) -> Path:
    """A copy of a checkpoint in the directory ``output`` whose dynamic table ``table`` is that of Parquet files.

    ``files``: the whole table, and then, in their order, what had changed since the one before. Any number of ranks can
    load it. Raises DataError for a table that the checkpoint has not, and for files that are not of it.
    """
    copy = output / checkpoint.name
    if copy.exists():
        raise DataError(f"{copy} exists; give another directory")
    if (checkpoint / CONSOLIDATED).is_file():
        raise DataError(f"{checkpoint} is an export; give a checkpoint")
    if problems := file_problems(checkpoint, read_manifest(checkpoint)):
        raise DataError("\n  ".join([f"cannot import into {checkpoint}:", *problems]))
    old = _Old.of(checkpoint, table)
    content = _following([_read(path, old) for path in files])
    aside = output / f".writing_{checkpoint.name}"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoint, aside)
    changed: list[Path] = []
    for path in sorted(aside.glob(DYNAMIC_FILES)):
        tables = {name: plain for name, plain in read_plain(path).items() if name != table}
        path.unlink()
        times_file(path).unlink(missing_ok=True)
        if not changed:
            tables[table] = as_plain(content)
        changed += write_dynamic_tables(aside, tables, rank_of(path))
    kept = {name: entry for name, entry in read_manifest(aside).items() if not name.startswith("dynamic_")}
    write_manifest(aside, kept | describe_files(aside, changed))
    return aside.rename(copy)


@dataclass(frozen=True)
class _Old:
    """The table that is replaced."""

    checkpoint: Path
    name: str
    part: TableContent
    """One of its parts, with the times of all."""
    raw_ids: np.ndarray | None

    @classmethod
    def of(cls, checkpoint: Path, table: str) -> _Old:
        parts = read_table(checkpoint, table)
        whole = replace(parts[0], times=last_of_all([part.times for part in parts]))
        return cls(checkpoint, table, whole, raw_ids_of_table(checkpoint, table))


@dataclass(frozen=True)
class _File:
    path: Path
    since_step: int | None
    """None: it is whole."""
    content: TableContent


def _following(files: Sequence[_File]) -> TableContent:
    """The first file, with the rows of the others in place of what they follow."""
    content = files[0].content
    if files[0].since_step is not None:
        raise DataError(
            f"{files[0].path} has only what changed after batch {files[0].since_step}: name the file of the whole "
            "table before it, as --parquet whole.parquet changes.parquet"
        )
    for file in files[1:]:
        if file.since_step is None:
            raise DataError(f"{file.path} is not known to be changes of a table, as only files after the first may be")
        if file.since_step > content.step:
            raise DataError(
                f"{file.path} has what changed after batch {file.since_step}, the files before it end with batch "
                f"{content.step}: what changed in between is missing"
            )
        before = content.chosen(~torch.isin(content.ids, file.content.ids))
        content = replace(merged([before, file.content]), times=file.content.times)
    return content


def _read(path: Path, old: _Old) -> _File:
    """One file. Columns that it lacks: seen once, now; no states. Raises DataError for what is no such file."""
    try:
        arrow = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise DataError(f"{path} cannot be read as a Parquet file: {why}") from error
    described = json.loads((arrow.schema.metadata or {}).get(METADATA, b"{}"))
    if described.get("table", old.name) != old.name:
        raise DataError(f"{path} is of the table {described['table']!r}, not of {old.name!r}")
    old_part, columns = old.part, _Columns(path, arrow)
    step = described.get("step", old_part.step)
    ids = columns.ids(old.raw_ids)
    rows = columns.numbers("row", None, old_part.rows)
    now = torch.full_like(ids, step)
    counts, steps = columns.numbers("count", torch.ones_like(ids), ids), columns.numbers("step", now, ids)
    states = {
        name: columns.numbers(f"{STATE}{name}", torch.zeros(len(ids), *state.shape[1:]), state)
        for name, state in old_part.states.items()
    }
    changed = columns.numbers("changed", now, ids)
    for name, numbers, most in (("count", counts, None), ("step", steps, MAX_STEP), ("changed", changed, MAX_STEP)):
        if (numbers < 0).any():
            raise DataError(f"{path}: column {name!r} has numbers below 0")
        if most is not None and (numbers > most).any():
            raise DataError(f"{path}: column {name!r} has numbers above {most}: it counts training batches")
    times = tuple((moment, batch) for moment, batch in described.get("times", old_part.times))
    content = TableContent(
        policy=old_part.policy,
        step=int(torch.cat([torch.tensor([step]), steps, changed]).max()),
        ids=ids,
        scores=score(old_part.policy, counts, steps),
        changed=changed,
        rows=rows,
        states=states,
        times=times,
    )
    return _File(path, described.get("since_step"), content)


@dataclass(frozen=True)
class _Columns:
    path: Path
    arrow: pa.Table

    def ids(self, raw_ids: np.ndarray | None) -> Tensor:
        """int64 [n]. A raw id is looked up, where raw ids are known; what tells ids otherwise is ``id``."""
        raw = self.arrow.column("raw_id") if "raw_id" in self.arrow.column_names else None
        if raw is not None and raw_ids is not None and not raw.null_count:
            ids = torch.from_numpy(self._codes(raw, raw_ids))
        else:
            ids = self.numbers("id", None, torch.empty(0, dtype=torch.int64))
        if len(ids.unique()) < len(ids):
            raise DataError(f"{self.path} has ids more than once")
        return ids

    def _codes(self, raw: pa.ChunkedArray, raw_ids: np.ndarray) -> np.ndarray:
        are_strings = raw_ids.dtype == object
        if pa.types.is_integer(raw.type) == are_strings:
            kind = "strings" if are_strings else "whole numbers"
            raise DataError(f"{self.path}: the checkpoint's ids are {kind}, those of the column raw_id are {raw.type}")
        wanted = np.array(raw.cast(pa.large_string() if are_strings else pa.int64()))
        codes = np.minimum(np.searchsorted(raw_ids, wanted), len(raw_ids) - 1).astype(np.int64)
        unknown = wanted[raw_ids[codes] != wanted]
        if len(unknown):
            shown = ", ".join(map(repr, unknown[:5].tolist())) + (", …" if len(unknown) > 5 else "")
            raise DataError(f"{self.path}: {len(unknown)} raw id(s) are not known to the checkpoint: {shown}")
        return codes

    def numbers(self, name: str, default: Tensor | None, like: Tensor) -> Tensor:
        """A column as a tensor of the type and width of ``like``; ``default`` where there is none, None: an error."""
        if name not in self.arrow.column_names:
            if default is None:
                raise DataError(f"{self.path} has no column {name!r}; it has {', '.join(self.arrow.column_names)}")
            return default.to(like.dtype)
        column = self.arrow.column(name).combine_chunks()
        try:
            numbers = _flat(column, like)
        except (pa.ArrowException, ValueError) as error:
            wanted = f"a list of {like.shape[1]} numbers" if like.dim() > 1 else "a number"
            raise DataError(f"{self.path}: column {name!r} must have {wanted} in every row: {error}") from error
        if not numbers.isfinite().all():
            raise DataError(f"{self.path}: column {name!r} has numbers that are not finite")
        return numbers


def _flat(column: pa.Array, like: Tensor) -> Tensor:
    """A column of numbers, or of lists of them, as a tensor of the type and width of ``like``. Raises ValueError."""
    flat = column
    if like.dim() > 1:
        if column.null_count or pc.any(pc.not_equal(pc.list_value_length(column), like.shape[1])).as_py():
            raise ValueError("it has others")
        flat = column.flatten()
    if flat.null_count:
        raise ValueError("it has nulls")
    kind = pa.int64() if like.dtype == torch.int64 else pa.float32()
    return torch.from_numpy(np.array(flat.cast(kind))).to(like.dtype).view(len(column), *like.shape[1:])
