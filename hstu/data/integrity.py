"""Checksums of a store's files and of its description."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_SEAL = "sha256"


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(meta: Mapping[str, Any]) -> str:
    """JSON of ``meta`` with the checksum of its own content."""
    return json.dumps({**meta, _SEAL: _digest(meta)}, indent=1, ensure_ascii=False)


def is_intact(meta: Mapping[str, Any]) -> bool:
    """Whether the seal fits; stores of before the checksums have none and pass."""
    if _SEAL not in meta:
        return f'"{_SEAL}"' not in json.dumps(meta.get("files"))
    return bool(meta[_SEAL] == _digest({name: value for name, value in meta.items() if name != _SEAL}))


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def array_header(dtype: str, length: int) -> bytes:
    """How the .npy file of a one-dimensional array begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    return header.getvalue()
