"""safetensors files (https://huggingface.co/docs/safetensors, "Format"): a JSON header, then the tensors' bytes.

Written through a memory map, so that a model of any size needs the memory of what is being copied into it alone; the
package of that name wants all tensors in memory twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.config.errors import DataError

_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8  # little endian, before the header


def create_file(
    path: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """A new file for tensors of these sizes and types; the tensors that come back are its memory map, to be filled."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (size, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):  # aligned
        start, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(_LENGTH_BYTES + len(text) + end)
    return _tensors(path, header, _LENGTH_BYTES + len(text), "r+")


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory mapped: what is written into them reaches no disk. Raises DataError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        return _tensors(path, header, _LENGTH_BYTES + length, "c")
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise DataError(f"{path} is no safetensors file, or damaged ({error}). Export the model anew.") from error


def _tensors(path: Path, header: Mapping[str, Any], start: int, mode: Any) -> dict[str, Tensor]:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not any(math.prod(entry["shape"]) for entry in entries.values()):
        return {name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]]) for name, entry in entries.items()}
    data = torch.from_numpy(np.memmap(path, np.uint8, mode, offset=start))
    tensors = {}
    for name, entry in entries.items():
        first, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError(f"{name} reaches beyond the end of the file")
        tensors[name] = data[first:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors
