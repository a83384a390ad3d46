"""Exports dynamic tables of a checkpoint as Parquet files with one row per id.

Columns: ``id`` (int64, as in the table), ``raw_id`` (int64 or string, as in the data; only if a single feature uses the
table and the checkpoint has its raw ids), ``count`` (how often the id was trained on), ``step`` (last training batch
with the id), ``changed`` (the same, including sampled negatives), ``row`` (list of float32) and ``state.<name>``
(optimizer state: a number or a list of float32).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hstu.base.errors import DataError
from hstu.base.files import written_aside
from hstu.checkpoint.directory import listed_files, verified_file
from hstu.checkpoint.dynamic import DYNAMIC_FILES, read_table
from hstu.checkpoint.raw_ids import RawIds
from hstu.checkpoint.tensors import open_tensors, read_metadata
from hstu.parallel.dynamic.content import TableContent
from hstu.parallel.dynamic.slots import counts_of, steps_of

METADATA = b"dynamic_table"


def export_table(checkpoint: Path, table: str, path: Path, since_step: int | None = None) -> tuple[int, int]:
    """Write the ids of a dynamic table; with ``since_step``, only ids whose rows changed after that batch.

    Returns the number of ids and the table's number of training batches: ``since_step`` of the next export.
    Raises DataError if the checkpoint is damaged, it lacks the table, or the file cannot be written.
    """
    for file in listed_files(checkpoint, DYNAMIC_FILES):
        verified_file(checkpoint, file.name)
    parts = read_table(checkpoint, table)
    step = max(part.step for part in parts)
    if since_step is not None:
        parts = [part.changed_since(since_step) for part in parts]
    features = read_metadata(checkpoint).get("tables", {}).get(table, {}).get("features", [])
    known = RawIds.from_stored(open_tensors(checkpoint), features)
    raw_ids = known.decoded(features[0]) if len(features) == 1 else None
    arrow = pa.concat_tables([_to_arrow(part, raw_ids) for part in parts])
    metadata = {METADATA: json.dumps({"table": table, "step": step, "since_step": since_step})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            pq.write_table(arrow.replace_schema_metadata(metadata), aside)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    return int(arrow.num_rows), step


def _to_arrow(content: TableContent, raw_ids: np.ndarray | None) -> pa.Table:
    columns: dict[str, Tensor] = {
        "id": content.ids,
        "count": counts_of(content.policy, content.scores),
        "step": steps_of(content.policy, content.scores),
        "changed": content.changed,
        "row": content.rows,
        **{f"state.{name}": state for name, state in content.states.items()},
    }
    arrow = pa.table({name: _to_array(tensor.numpy()) for name, tensor in columns.items()})
    if raw_ids is None:
        return arrow
    ids, kind = content.ids.numpy(), pa.large_string() if raw_ids.dtype == object else pa.int64()
    known = (ids >= 0) & (ids < len(raw_ids))  # all others become null
    return arrow.add_column(1, "raw_id", pa.array(raw_ids[np.where(known, ids, 0)], kind, mask=~known))


def _to_array(numbers: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(numbers).reshape(-1))
    return flat if numbers.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])
