"""Exports and descriptions of a checkpoint: safetensors for other tools, Parquet for dynamic tables, lines of text."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from hstu.base import remote
from hstu.base.errors import DataError
from hstu.base.files import remove, written_aside
from hstu.checkpoint.directory import (
    MANIFEST,
    check_files,
    describe_files,
    listed_files,
    read_manifest,
    verified_file,
    write_manifest,
)
from hstu.checkpoint.dynamic import DYNAMIC_FILES, export_sizes, fill_export, read_tables
from hstu.checkpoint.find import GIN
from hstu.checkpoint.raw_ids import RawIds
from hstu.checkpoint.tensors import (
    AVERAGE,
    CONSOLIDATED,
    EXPORT_VERSION,
    STATES,
    is_export,
    join_name,
    open_tensors,
    read_metadata,
    sizes_of_ranks,
    split_name,
)
from hstu.parallel.dynamic.slots import counts_of, steps_of
from hstu.parallel.dynamic.table import TableContent
from hstu.parallel.shards import ShardedView

_NAMES = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
"""Dtype → its name in a safetensors file."""


def export(
    checkpoint: Path, output: Path, write_more: Callable[[Path], None] | None = None, *, weights: bool = True
) -> Path:
    """Write the weights of a checkpoint, with names, ids and configuration, to the new directory ``output``.

    ``model.safetensors`` holds the weights (moving averages where the run keeps them), the raw ids of table rows as
    ``ids.<feature>`` (see RawIds), and dynamic tables (see dynamic.py). ``operative.gin`` is the configuration, and
    ``config.json`` lists the tables. Host memory must hold one rank's part of one tensor. ``write_more`` writes further
    files to the unfinished directory; without ``weights`` only these. A URL gets a copy, of which the local path is
    returned. Raises DataError if the checkpoint is damaged or
    ``output`` exists.
    """
    given, url = output, remote.url_of(output)
    output = output if url is None else remote.Cache.of().place(url)
    if url is not None:
        remove(output)  # of an upload that failed
    if output.exists() or (url is not None and remote.read(f"{url}/{MANIFEST}")):
        raise DataError(f"{given} exists; give the name of a directory that does not exist")
    check_files(checkpoint, f"cannot export {checkpoint}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as temporary:
        temporary.mkdir()
        if weights:
            _write(checkpoint, temporary)
        if write_more is not None:
            write_more(temporary)
        write_manifest(temporary, describe_files(temporary, (path for path in temporary.rglob("*") if path.is_file())))
    if url is not None:
        remote.upload(output, url, MANIFEST)
    return output


def _write(checkpoint: Path, temporary: Path) -> None:
    dynamic = read_tables(checkpoint)
    tensors = _write_tensors(checkpoint, dynamic, temporary / CONSOLIDATED)
    shutil.copyfile(checkpoint / GIN, temporary / GIN)
    metadata = read_metadata(checkpoint)
    tables = dict(metadata.get("tables", {}))
    for name, parts in dynamic.items():  # only the rows in use
        tables[name] |= {"rows": sum(len(part.ids) for part in parts), "dynamic": True}
    config = {
        "format": "hstu-export",
        "version": EXPORT_VERSION,
        "iteration": metadata["iteration"],
        "versions": metadata.get("versions", {}),
        "tables": tables,
        "tensors": tensors,
        "features": metadata.get("features", {}),
        "trained_on": metadata.get("trained_on", {}),
    }
    (temporary / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_tensors(checkpoint: Path, dynamic: dict[str, list[TableContent]], path: Path) -> dict[str, Any]:
    stored = open_tensors(checkpoint)
    weights = [name for name in stored.sizes if not split_name(name)[1]]
    sources = {name: join_name(name, AVERAGE) for name in weights}
    sources = {name: average if average in stored.sizes else name for name, average in sources.items()}
    sizes = {name: (stored.sizes[name], stored.dtypes[name]) for name in weights}
    tensors = create_safetensors(path, sizes | export_sizes(dynamic))
    stored.read({source: ShardedView.whole(tensors[name]) for name, source in sources.items()})
    fill_export(tensors, dynamic)
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "is_average": sources.get(name, name) != name,
        }
        for name, tensor in tensors.items()
    }


def create_safetensors(path: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Create a safetensors file and return its tensors as a writable memory map of the file.

    The library (0.8) saves only tensors in memory, and tables may be larger. Format: an 8-byte little-endian length, a
    JSON header and the tensors' bytes (https://huggingface.co/docs/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (size, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):  # aligned
        start, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    data = torch.from_numpy(np.memmap(path, np.uint8, "r+", offset=8 + len(text))) if end else torch.empty(0).byte()
    mapped = {}
    for name, entry in header.items():
        if name in tensors:
            (start, stop), (size, dtype) = entry["data_offsets"], tensors[name]
            mapped[name] = data[start:stop].view(dtype).view(size)
    return mapped


def export_table(checkpoint: Path, table: str, path: Path, since_step: int | None = None) -> tuple[int, int]:
    """Write a Parquet file with one row per id; with ``since_step``, only ids whose rows changed after that batch.

    Columns: ``id`` (int64, as in the table), ``raw_id`` (int64 or string, as in the data; only if a single feature uses
    the table and the checkpoint has its raw ids), ``count`` (how often the id was trained on), ``step`` (last training
    batch with the id), ``changed`` (the same, including sampled negatives), ``row`` (list of float32) and
    ``state.<name>`` (optimizer state: a number or a list of float32).

    Returns the number of ids and the table's number of training batches: ``since_step`` of the next export.
    Raises DataError if the checkpoint is damaged, it lacks the table, or the file cannot be written.
    """
    for file in listed_files(checkpoint, DYNAMIC_FILES):
        verified_file(checkpoint, file.name)
    tables = read_tables(checkpoint)
    if table not in tables:
        raise DataError(f"{checkpoint} has no dynamic table {table!r}; it has {', '.join(sorted(tables)) or 'none'}")
    parts = tables[table]
    step = max(part.step for part in parts)
    if since_step is not None:
        parts = [part.select(part.changed > since_step) for part in parts]
    features = read_metadata(checkpoint).get("tables", {}).get(table, {}).get("features", [])
    known = RawIds.from_stored(open_tensors(checkpoint), features)
    raw_ids = known.decoded(features[0]) if len(features) == 1 else None
    arrow = pa.concat_tables([_to_arrow(part, raw_ids) for part in parts])
    metadata = {"dynamic_table": json.dumps({"table": table, "step": step, "since_step": since_step})}
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
        "row": content.rows.float(),
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


def describe(root: Path, with_optimizer: bool = False) -> Iterator[str]:
    """Describe the run, the tensors with their sizes, and the files. ``with_optimizer``: list each optimizer state."""
    files, tensors = read_manifest(root), open_tensors(root)
    bytes_of = {name: math.prod(size) * tensors.dtypes[name].itemsize for name, size in tensors.sizes.items()}
    yield f"{'export' if is_export(root) else 'checkpoint'} {root}"
    for name, value in _facts(root).items():
        yield f"  {name:<22} {value}"
    yield f"\n{len(bytes_of)} tensors, {sum(bytes_of.values()):,} bytes"
    states = [] if with_optimizer else [name for name in bytes_of if name.startswith(STATES)]
    for name in sorted(bytes_of.keys() - states):
        dtype = str(tensors.dtypes[name]).removeprefix("torch.")
        yield f"  {bytes_of[name]:>14,}  {dtype:<9} {list(tensors.sizes[name])!s:<16} {name}"
    if states:
        total = sum(bytes_of[name] for name in states)
        yield f"  {total:>14,}  {len(states)} states of the optimizers (--optimizer lists them)"
    yield f"\n{len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes"
    for name, entry in files.items():
        yield f"  {entry['bytes']:>14,}  {name}"


def _facts(root: Path) -> dict[str, Any]:
    metadata = read_metadata(root)
    facts = {"iteration": metadata["iteration"]}
    if not is_export(root):
        position = metadata["position"]
        facts["data"] = f"epoch {position['epoch']}, {position['consumed']} samples consumed"
        ranks, tp, cp = sizes_of_ranks(metadata)
        facts["ranks"] = f"{ranks} in groups of {tp * cp}"
        facts["learning rate"] = f"× {metadata['optimizer']['lr_multiplier']}"
    dynamic = read_tables(root)
    for table, entry in metadata.get("tables", {}).items():
        features = ", ".join(entry["features"])
        if table in dynamic:
            ids, width = sum(len(part.ids) for part in dynamic[table]), dynamic[table][0].rows.shape[1]
            facts[f"dynamic table {table}"] = f"{ids:,} ids × {width} of {features}"
        else:
            facts[f"table {table}"] = f"{entry['rows']} × {entry['dim']} of {features}"
    return facts | {f"version of {name}": version for name, version in metadata.get("versions", {}).items()}
