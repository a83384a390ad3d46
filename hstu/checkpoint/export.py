"""Exports a trained model for other tools: one safetensors file, and the data for looking up ids in it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import DataError
from hstu.base.files import written_aside
from hstu.checkpoint.directory import check_files, describe_files, write_manifest
from hstu.checkpoint.dynamic import export_sizes, fill_export, read_tables
from hstu.checkpoint.tensors import (
    AVERAGE,
    CONSOLIDATED,
    EXPORT_VERSION,
    join_name,
    open_tensors,
    read_metadata,
    split_name,
)
from hstu.parallel.dynamic.content import TableContent
from hstu.parallel.shards import ShardedView

_GIN = "operative.gin"
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def export(checkpoint: Path, output: Path, write_more: Callable[[Path], None] | None = None) -> Path:
    """Write the weights of a checkpoint, with names, ids and configuration, to the new directory ``output``.

    ``model.safetensors`` holds the weights (moving averages where the run keeps them), the raw ids of table rows as
    ``ids.<feature>`` (see RawIds), and dynamic tables (see dynamic.py). ``operative.gin`` is the configuration, and
    ``config.json`` lists the tables. Host memory must hold one rank's part of one tensor. ``write_more`` writes further
    files to the unfinished directory. Raises DataError if the checkpoint is damaged or ``output`` exists.
    """
    if output.exists():
        raise DataError(f"{output} exists; give the name of a directory that does not exist")
    check_files(checkpoint, f"cannot export {checkpoint}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as temporary:
        temporary.mkdir()
        _write(checkpoint, temporary)
        if write_more is not None:
            write_more(temporary)
        write_manifest(temporary, describe_files(temporary, (path for path in temporary.rglob("*") if path.is_file())))
    return output


def _write(checkpoint: Path, temporary: Path) -> None:
    dynamic = read_tables(checkpoint)
    tensors = _write_tensors(checkpoint, dynamic, temporary / CONSOLIDATED)
    shutil.copyfile(checkpoint / _GIN, temporary / _GIN)
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
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(size), "data_offsets": [start, end]}
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
