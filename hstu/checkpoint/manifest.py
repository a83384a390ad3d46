"""The list of a checkpoint's files with their sizes and checksums.

torch.distributed.checkpoint loads flipped bytes without a word; the manifest is what notices them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hstu.config.errors import DataError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_CHUNK_BYTES = 1 << 22


def describe_files(root: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Write the files through to the disk; path relative to ``root`` → {"bytes", "sha256"}."""
    described = {}
    for path in files:
        sync_to_disk(path)
        described[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return described


def write_manifest(root: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, the last file of a checkpoint."""
    path = root / MANIFEST
    path.write_text(json.dumps({"version": FORMAT_VERSION, "files": dict(sorted(files.items()))}, indent=1))
    sync_to_disk(path)
    sync_to_disk(root)


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint. Raises DataError where there is no readable manifest of this version."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["version"], manifest["files"]
    except FileNotFoundError:
        raise DataError(f"{root} is not a complete checkpoint: it has no {MANIFEST}. Load another one.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). Load another checkpoint.") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}.")
    return dict(files)


def file_problems(root: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each file that is missing or not what was written."""
    problems = []
    for name, expected in files.items():
        path = root / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif _sha256(path) != expected["sha256"]:
            problems.append(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    return problems


def sync_to_disk(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
