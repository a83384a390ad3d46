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
_UNSIGNED_VERSION = 1  # as the present one, without a checksum of the list itself

Files = dict[str, dict[str, Any]]
"""Path relative to the checkpoint → {"bytes", "sha256"}."""


class DamagedCheckpoint(DataError):
    """Files of a checkpoint that are missing, torn, flipped or not to be understood, by name."""


def describe_files(root: Path, files: Iterable[Path]) -> Files:
    """Write the files through to the disk; their sizes and checksums."""
    described = {}
    for path in files:
        sync_to_disk(path)
        described[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return described


def write_manifest(root: Path, files: Files) -> None:
    """Write the manifest, the last file of a checkpoint."""
    path = root / MANIFEST
    path.write_text(_as_text(FORMAT_VERSION, files), encoding="utf-8")
    sync_to_disk(path)
    sync_to_disk(root)


def read_manifest(root: Path) -> Files:
    """The files of a checkpoint.

    Raises DamagedCheckpoint where there is no manifest of a known version that is byte for byte as written.
    """
    path = root / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, files = manifest["version"], manifest["files"]
        if version in (FORMAT_VERSION, _UNSIGNED_VERSION) and text != _as_text(version, files):
            raise ValueError("it is not as it was written")
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{root} is not a complete checkpoint: it has no {MANIFEST}. Load another one."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    if version not in (FORMAT_VERSION, _UNSIGNED_VERSION):
        raise DamagedCheckpoint(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}.")
    return dict(files)


def _as_text(version: int, files: Files) -> str:
    """The manifest as it is written: the same bytes for the same files."""
    files = dict(sorted(files.items()))
    signature = {"sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}
    return json.dumps(
        {"version": version, **(signature if version != _UNSIGNED_VERSION else {}), "files": files}, indent=1
    )


def file_problems(root: Path, files: Files) -> list[str]:
    """One line for each file that is missing or not what was written."""
    return [problem for name, expected in files.items() if (problem := _problem(root / name, expected))]


def _problem(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        size, sha256 = path.stat().st_size, _sha256(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if size != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    return None if sha256 == expected["sha256"] else f"{path} is damaged: its sha256 is not the one in {MANIFEST}"


def sync_to_disk(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
