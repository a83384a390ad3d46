"""Dynamic tables of a checkpoint as Parquet files, a row an id, so that other tools can work on them.

Columns: ``id`` (int64, as the table knows it), ``raw_id`` (as the data has it, int64 or a string, where the checkpoint
knows), ``count`` (how often it was trained on), ``step`` (in which training batch last), ``changed`` (the same, as a
sampled negative, too), ``row`` (a list of float32) and ``state.<name>`` of the optimizer. dynamic_import.py reads them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hstu.checkpoint.dynamic import read_table
from hstu.checkpoint.manifest import file_problems, read_manifest
from hstu.checkpoint.row_ids import raw_ids_of
from hstu.checkpoint.tensor_files import open_tensors, read_description
from hstu.config.errors import DataError
from hstu.parallel.dynamic.content import TableContent
from hstu.parallel.dynamic.slots import counts_of, steps_of
from hstu.parallel.dynamic.times import last_of_all, newest_before

STATE = "state."
METADATA = b"dynamic_table"


@dataclass(frozen=True)
class Dump:
    """What was written."""

    ids: int
    step: int
    """Training batches that the table has seen: what changes later has changed since this one."""


def export_table(checkpoint: Path, table: str, path: Path, since_step: int | None = None) -> Dump:
    """Write the ids of a dynamic table, or (``since_step``) those whose rows have changed after that batch.

    Raises DataError where the checkpoint has no such table or is damaged, and where the file cannot be written.
    """
    of_tables = {name: entry for name, entry in read_manifest(checkpoint).items() if name.startswith("dynamic_")}
    if problems := file_problems(checkpoint, of_tables):
        raise DataError("\n  ".join([f"cannot export {table} of {checkpoint}:", *problems]))
    parts = read_table(checkpoint, table)
    step, times = max(part.step for part in parts), last_of_all([part.times for part in parts])
    if since_step is not None:
        parts = [part.changed_since(since_step) for part in parts]
    raw_ids = raw_ids_of_table(checkpoint, table)
    arrow = pa.concat_tables([_as_arrow(part, raw_ids) for part in parts])
    described = {"table": table, "step": step, "since_step": since_step, "times": times}
    aside = path.with_name(f".writing_{path.name}")
    with _file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(arrow.replace_schema_metadata({METADATA: json.dumps(described)}), aside)
        aside.replace(path)
    return Dump(int(arrow.num_rows), step)


def batch_at(checkpoint: Path, table: str, moment: float) -> tuple[float, int] | None:
    """(when, batch): the newest batch of a table's log that was done by ``moment``; all in seconds since 1970.

    None: the log begins later, or there is none. Raises DataError for a moment that is still to come.
    """
    if moment > time.time():
        raise DataError(f"{moment:.0f} seconds since 1970 are still to come: give a time that is past, in seconds")
    return newest_before(last_of_all([part.times for part in read_table(checkpoint, table)]), moment)


def raw_ids_of_table(checkpoint: Path, table: str) -> np.ndarray | None:
    """id → raw id of a table, see raw_ids_of."""
    features = read_description(checkpoint).get("tables", {}).get(table, {}).get("features", [])
    return raw_ids_of(open_tensors(checkpoint), features)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def _as_arrow(content: TableContent, raw_ids: np.ndarray | None) -> pa.Table:
    columns: dict[str, Tensor] = {
        "id": content.ids,
        "count": counts_of(content.policy, content.scores),
        "step": steps_of(content.policy, content.scores),
        "changed": content.changed,
        "row": content.rows,
        **{f"{STATE}{name}": state for name, state in content.states.items()},
    }
    arrow = pa.table({name: _as_array(tensor.numpy()) for name, tensor in columns.items()})
    return arrow if raw_ids is None else arrow.add_column(1, "raw_id", _raw(content.ids.numpy(), raw_ids))


def _raw(ids: np.ndarray, raw_ids: np.ndarray) -> pa.Array:
    """Null for ids that are no codes."""
    known = (ids >= 0) & (ids < len(raw_ids))
    kind = pa.large_string() if raw_ids.dtype == object else pa.int64()
    return pa.array(raw_ids[np.where(known, ids, 0)], kind, mask=~known)


def _as_array(numbers: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(numbers).reshape(-1))
    return flat if numbers.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])
