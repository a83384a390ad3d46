"""Exports and descriptions of a checkpoint: safetensors for other tools, lines of text."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from hstu.base import remote
from hstu.base.errors import DataError
from hstu.base.files import remove, written_aside
from hstu.checkpoint.directory import MANIFEST, check_files, describe_files, read_manifest, write_manifest
from hstu.checkpoint.dynamic import export_sizes, fill_export, read_tables
from hstu.checkpoint.find import GIN
from hstu.checkpoint.tensors import (
    AVERAGE,
    CONSOLIDATED,
    EXPORT_VERSION,
    STATES,
    StoredTensors,
    is_export,
    join_name,
    read_metadata,
    sizes_of_ranks,
    split_name,
)
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
    returned. Raises DataError if the checkpoint is damaged or ``output`` exists.
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
    stored = StoredTensors(checkpoint)
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


def describe(root: Path, with_optimizer: bool = False) -> Iterator[str]:
    """Describe the run, the tensors with their sizes, and the files. ``with_optimizer``: list each optimizer state."""
    files, tensors = read_manifest(root), StoredTensors(root)
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
