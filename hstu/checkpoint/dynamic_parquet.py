"""Dynamic tables of a checkpoint as Parquet files, a row an id, and back, so that other tools can work on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hstu.checkpoint.dynamic import DYNAMIC_FILES, as_plain, read_plain, read_table, write_dynamic_tables
from hstu.checkpoint.manifest import describe_files, read_manifest, write_manifest
from hstu.config.errors import DataError
from hstu.parallel.dynamic.content import TableContent
from hstu.parallel.dynamic.slots import counts_of, score, steps_of

_STATE = "state."
_COLUMNS = ("id", "count", "step", "changed", "row")
_METADATA = b"dynamic_table"


def export_table(checkpoint: Path, table: str, path: Path, since_step: int = 0) -> int:
    """Write the ids of a dynamic table whose rows have changed after batch ``since_step``; returns how many.

    Columns: id, count (how often it was trained on), step (when last, in training batches), changed (the same, as a
    sampled negative, too), row (a list of float32) and state.<name> of the optimizer. Raises DataError where the
    checkpoint has no such table.
    """
    parts = [part.changed_since(since_step) for part in read_table(checkpoint, table)]
    arrow = pa.concat_tables([_as_arrow(part) for part in parts])
    described = json.dumps({"policy": parts[0].policy, "step": max(part.step for part in parts)})
    pq.write_table(arrow.replace_schema_metadata({_METADATA: described}), path)
    return int(arrow.num_rows)


def read_parquet(path: Path) -> TableContent:
    """What ``export_table`` has written. Raises DataError for another file."""
    arrow = pq.read_table(path)
    described = (arrow.schema.metadata or {}).get(_METADATA)
    missing = [name for name in _COLUMNS if name not in arrow.column_names]
    if described is None or missing:
        raise DataError(f"{path} is no export of a dynamic table: it lacks {', '.join(missing) or 'its description'}")
    known = json.loads(described)
    counts, steps = (torch.from_numpy(_numbers(arrow, name)) for name in ("count", "step"))
    return TableContent(
        policy=known["policy"],
        step=known["step"],
        ids=torch.from_numpy(_numbers(arrow, "id")),
        scores=score(known["policy"], counts, steps),
        changed=torch.from_numpy(_numbers(arrow, "changed")),
        rows=torch.from_numpy(_numbers(arrow, "row")),
        states={
            name.removeprefix(_STATE): torch.from_numpy(_numbers(arrow, name))
            for name in arrow.column_names
            if name.startswith(_STATE)
        },
    )


def import_table(checkpoint: Path, table: str, parquet: Path, output: Path) -> Path:
    """A copy of a checkpoint in the directory ``output`` whose dynamic table ``table`` is that of a Parquet file.

    Any number of ranks can load it. Raises DataError for a table that the checkpoint has not, and one of another width.
    """
    content, old = read_parquet(parquet), read_table(checkpoint, table)[0]
    if content.rows.shape[1] != old.rows.shape[1]:
        raise DataError(f"{parquet} has rows {content.rows.shape[1]} wide, {table} of {checkpoint} {old.rows.shape[1]}")
    copy = output / checkpoint.name
    shutil.copytree(checkpoint, copy)
    changed: list[Path] = []
    for path in sorted(copy.glob(DYNAMIC_FILES)):
        tables = {name: plain for name, plain in read_plain(path).items() if name != table}
        path.unlink()
        if not changed:
            tables[table] = as_plain(content)
        changed += write_dynamic_tables(copy, tables, int(path.stem.removeprefix("dynamic_rank")))
    files = {name: entry for name, entry in read_manifest(copy).items() if (copy / name).exists()}
    write_manifest(copy, files | describe_files(copy, changed))
    return copy


def _as_arrow(content: TableContent) -> pa.Table:
    columns: dict[str, Tensor] = {
        "id": content.ids,
        "count": counts_of(content.policy, content.scores),
        "step": steps_of(content.policy, content.scores),
        "changed": content.changed,
        "row": content.rows,
        **{f"{_STATE}{name}": state for name, state in content.states.items()},
    }
    return pa.table({name: _as_array(tensor.numpy()) for name, tensor in columns.items()})


def _as_array(numbers: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(numbers).reshape(-1))
    return flat if numbers.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])


def _numbers(arrow: pa.Table, name: str) -> np.ndarray:
    column = arrow.column(name).combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        return np.array(column)
    return np.array(column.flatten()).reshape(len(column), column.type.list_size)
