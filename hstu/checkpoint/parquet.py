"""Dynamic tables of a checkpoint to Parquet files and back, so that other tools can work on them.

A file has one row per id. Columns: ``id`` (int64, as the table uses it), ``raw_id`` (int64 or string, as the data has
it; only if the checkpoint holds raw ids), ``count`` (how many times the id was trained on), ``step`` (the last training
batch that had it), ``changed`` (the same, counting sampled negatives), ``row`` (list of float32) and ``state.<name>``
(an optimizer state: a number or a list of float32).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hstu.base.errors import DataError
from hstu.base.files import written_aside
from hstu.base.ids import codes_of
from hstu.checkpoint.directory import (
    MANIFEST,
    check_files,
    describe_files,
    file_problems,
    listed_files,
    read_manifest,
    write_manifest,
)
from hstu.checkpoint.dynamic import (
    DYNAMIC_FILES,
    content_as_dict,
    rank_of,
    read_table,
    read_table_dicts,
    times_file,
    write_dynamic_tables,
)
from hstu.checkpoint.raw_ids import raw_ids_by_code
from hstu.checkpoint.tensors import is_export, open_tensors, read_metadata
from hstu.parallel.dynamic.content import TableContent, last_of_all, merged, newest_before
from hstu.parallel.dynamic.slots import MAX_STEP, counts_of, score, steps_of

STATE = "state."
METADATA = b"dynamic_table"


def export_table(checkpoint: Path, table: str, path: Path, since_step: int | None = None) -> tuple[int, int]:
    """Write the ids of a dynamic table; with ``since_step``, only those whose rows changed after that batch.

    Returns the number of ids, and the number of training batches that the table had seen: the step since which the next
    file of changes is to be exported.

    Raises DataError if the checkpoint is damaged or has no such table, or if the file cannot be written.
    """
    of_tables = {name: entry for name, entry in read_manifest(checkpoint).items() if name.startswith("dynamic_")}
    if problems := file_problems(checkpoint, of_tables):
        raise DataError("\n  ".join([f"cannot export {table} of {checkpoint}:", *problems]))
    parts = read_table(checkpoint, table)
    step, times = max(part.step for part in parts), last_of_all([part.times for part in parts])
    if since_step is not None:
        parts = [part.changed_since(since_step) for part in parts]
    raw_ids = _raw_ids(checkpoint, table)
    arrow = pa.concat_tables([_to_arrow(part, raw_ids) for part in parts])
    metadata = {"table": table, "step": step, "since_step": since_step, "times": times}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            pq.write_table(arrow.replace_schema_metadata({METADATA: json.dumps(metadata)}), aside)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    return int(arrow.num_rows), step


def batch_at(checkpoint: Path, table: str, moment: float) -> tuple[float, int] | None:
    """Return (time, batch) of the newest batch in a table's log that was done by ``moment``.

    Times are seconds since 1970. Returns None if the log is empty or starts later. Raises DataError for a time in the
    future.
    """
    if moment > time.time():
        raise DataError(f"{moment:.0f} seconds since 1970 are in the future: give a time that has passed, in seconds")
    return newest_before(last_of_all([part.times for part in read_table(checkpoint, table)]), moment)


def _raw_ids(checkpoint: Path, table: str) -> np.ndarray | None:
    features = read_metadata(checkpoint).get("tables", {}).get(table, {}).get("features", [])
    return raw_ids_by_code(open_tensors(checkpoint), features)


def _to_arrow(content: TableContent, raw_ids: np.ndarray | None) -> pa.Table:
    columns: dict[str, Tensor] = {
        "id": content.ids,
        "count": counts_of(content.policy, content.scores),
        "step": steps_of(content.policy, content.scores),
        "changed": content.changed,
        "row": content.rows,
        **{f"{STATE}{name}": state for name, state in content.states.items()},
    }
    arrow = pa.table({name: _to_array(tensor.numpy()) for name, tensor in columns.items()})
    if raw_ids is None:
        return arrow
    ids, kind = content.ids.numpy(), pa.large_string() if raw_ids.dtype == object else pa.int64()
    known = (ids >= 0) & (ids < len(raw_ids))  # the others are null
    return arrow.add_column(1, "raw_id", pa.array(raw_ids[np.where(known, ids, 0)], kind, mask=~known))


def _to_array(numbers: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(numbers).reshape(-1))
    return flat if numbers.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])


def import_table(checkpoint: Path, table: str, files: Sequence[Path], output: Path) -> Path:
    """Copy a checkpoint into the directory ``output``, with its dynamic table ``table`` replaced by Parquet files.

    ``files``: the whole table, then later changes, in order; other tools may have written them. Returns the path of the
    copy, which any number of ranks can load. Raises DataError if the checkpoint has no such table or is damaged, if the
    copy exists, or if a file does not fit the table.
    """
    copy = output / checkpoint.name
    if copy.exists():
        raise DataError(f"{copy} exists; give another directory")
    if is_export(checkpoint):
        raise DataError(f"{checkpoint} is an export; give a checkpoint")
    check_files(checkpoint, f"cannot import into {checkpoint}")
    parts, raw_ids = read_table(checkpoint, table), _raw_ids(checkpoint, table)
    stored = replace(parts[0], times=last_of_all([part.times for part in parts]))
    content = _combine([_read_file(path, table, stored, raw_ids) for path in files])
    copy.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(copy) as temporary:
        for name in [*read_manifest(checkpoint), MANIFEST]:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, temporary / name)
        changed: list[Path] = []
        for path in sorted(listed_files(temporary, DYNAMIC_FILES)):
            tables = {name: fields for name, fields in read_table_dicts(path).items() if name != table}
            path.unlink()
            times_file(path).unlink(missing_ok=True)
            if not changed:
                tables[table] = content_as_dict(content)
            changed += write_dynamic_tables(temporary, tables, rank_of(path))
        kept = {name: entry for name, entry in read_manifest(temporary).items() if not name.startswith("dynamic_")}
        write_manifest(temporary, kept | describe_files(temporary, changed))
    return copy


@dataclass(frozen=True)
class _ParquetFile:
    path: Path
    since_step: int | None
    """The batch after which the file has the changes. None: it has the whole table."""
    content: TableContent


def _combine(files: Sequence[_ParquetFile]) -> TableContent:
    """Return the content of the first file, with its rows replaced by those of the following files."""
    content = files[0].content
    if files[0].since_step is not None:
        raise DataError(
            f"{files[0].path} has only what changed after batch {files[0].since_step}: name the file of the whole "
            "table before it, as --parquet whole.parquet changes.parquet"
        )
    for file in files[1:]:
        if file.since_step is None:
            raise DataError(f"{file.path} does not say that it has changes of a table, as files after the first must")
        if file.since_step > content.step:
            raise DataError(
                f"{file.path} has what changed after batch {file.since_step}, but the files before it end with batch "
                f"{content.step}: the changes in between are missing"
            )
        unchanged = content.select(~torch.isin(content.ids, file.content.ids))
        content = replace(merged([unchanged, file.content]), times=file.content.times)
    return content


def _read_file(path: Path, table: str, stored: TableContent, raw_ids: np.ndarray | None) -> _ParquetFile:
    """Read one file of a table. Where columns are absent, ids were seen once, now, and states are zero.

    ``stored``: the first part of the table in the checkpoint. Raises DataError if the file does not fit it.
    """
    try:
        arrow = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise DataError(f"{path} cannot be read as a Parquet file: {reason}") from error
    metadata = json.loads((arrow.schema.metadata or {}).get(METADATA, b"{}"))
    if metadata.get("table", table) != table:
        raise DataError(f"{path} is of the table {metadata['table']!r}, not of {table!r}")
    step, columns = metadata.get("step", stored.step), _Columns(path, arrow)
    ids = columns.ids(raw_ids)
    rows = columns.tensor("row", None, stored.rows)
    now = torch.full_like(ids, step)
    counts, steps = columns.tensor("count", torch.ones_like(ids), ids), columns.tensor("step", now, ids)
    states = {
        name: columns.tensor(f"{STATE}{name}", torch.zeros(len(ids), *state.shape[1:]), state)
        for name, state in stored.states.items()
    }
    changed = columns.tensor("changed", now, ids)
    for name, numbers, maximum in (("count", counts, None), ("step", steps, MAX_STEP), ("changed", changed, MAX_STEP)):
        if (numbers < 0).any():
            raise DataError(f"{path}: column {name!r} has numbers below 0")
        if maximum is not None and (numbers > maximum).any():
            raise DataError(f"{path}: column {name!r} has numbers above {maximum}, but it counts training batches")
    content = TableContent(
        policy=stored.policy,
        step=int(torch.cat([torch.tensor([step]), steps, changed]).max()),
        ids=ids,
        scores=score(stored.policy, counts, steps),
        changed=changed,
        rows=rows,
        states=states,
        times=tuple((moment, batch) for moment, batch in metadata.get("times", stored.times)),
    )
    return _ParquetFile(path, metadata.get("since_step"), content)


@dataclass(frozen=True)
class _Columns:
    path: Path
    arrow: pa.Table

    def ids(self, raw_ids: np.ndarray | None) -> Tensor:
        """Return the ids, int64 [n]: looked up by the column raw_id where raw ids are known, else the column id."""
        raw = self.arrow.column("raw_id") if "raw_id" in self.arrow.column_names else None
        if raw is not None and raw_ids is not None and not raw.null_count:
            ids = torch.from_numpy(self._codes(raw, raw_ids))
        else:
            ids = self.tensor("id", None, torch.empty(0, dtype=torch.int64))
        if len(ids.unique()) < len(ids):
            raise DataError(f"{self.path} has ids more than once")
        return ids

    def _codes(self, raw: pa.ChunkedArray, raw_ids: np.ndarray) -> np.ndarray:
        are_strings = raw_ids.dtype == object
        if pa.types.is_integer(raw.type) == are_strings:
            kind = "strings" if are_strings else "whole numbers"
            raise DataError(f"{self.path}: the checkpoint's ids are {kind}, those of the column raw_id are {raw.type}")
        wanted = np.array(raw.cast(pa.large_string() if are_strings else pa.int64()))
        codes = codes_of(wanted, raw_ids)
        unknown = wanted[codes < 0]
        if len(unknown):
            shown = ", ".join(map(repr, unknown[:5].tolist())) + (", …" if len(unknown) > 5 else "")
            raise DataError(f"{self.path}: {len(unknown)} raw id(s) are not in the checkpoint: {shown}")
        return codes

    def tensor(self, name: str, default: Tensor | None, like: Tensor) -> Tensor:
        """Return a column with the dtype and width of ``like``, or ``default`` if it is absent; None: raise."""
        if name not in self.arrow.column_names:
            if default is None:
                raise DataError(f"{self.path} has no column {name!r}; it has {', '.join(self.arrow.column_names)}")
            return default.to(like.dtype)
        column = self.arrow.column(name).combine_chunks()
        try:
            numbers = _to_tensor(column, like)
        except (pa.ArrowException, ValueError) as error:
            wanted = f"a list of {like.shape[1]} numbers" if like.dim() > 1 else "a number"
            raise DataError(f"{self.path}: column {name!r} must have {wanted} in every row: {error}") from error
        if not numbers.isfinite().all():
            raise DataError(f"{self.path}: column {name!r} has numbers that are not finite")
        return numbers


def _to_tensor(column: pa.Array, like: Tensor) -> Tensor:
    """Convert a column of numbers, or of lists of numbers, to the dtype and width of ``like``. Raises ValueError."""
    flat = column
    if like.dim() > 1:
        if column.null_count or pc.any(pc.not_equal(pc.list_value_length(column), like.shape[1])).as_py():
            raise ValueError("some rows differ")
        flat = column.flatten()
    if flat.null_count:
        raise ValueError("it has nulls")
    kind = pa.int64() if like.dtype == torch.int64 else pa.float32()
    return torch.from_numpy(np.array(flat.cast(kind))).to(like.dtype).view(len(column), *like.shape[1:])
