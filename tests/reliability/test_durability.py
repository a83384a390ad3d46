"""The order of fsyncs and renames: after a power failure only synchronised data is sure to be on disk."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import MANIFEST, read_manifest
from hstu.checkpoint.store import CheckpointStore
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import run_cases
from tests.distributed.toy import new_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """The directory in which two ranks have saved a checkpoint, and all their fsyncs and renames, sorted by time."""
    directory = tmp_path_factory.mktemp("synchronised") / "checkpoints"
    ranks = run_cases(2, {"save": partial(save_and_log_syncs, directory=directory)})
    return directory, sorted(operation for rank in ranks for operation in rank["save"])


def save_and_log_syncs(mesh: Mesh, directory: Path) -> list[tuple[float, str, str]]:
    """Save a checkpoint and return this rank's fsyncs and renames with their times, from one clock for all ranks."""
    state, store = new_state(mesh), CheckpointStore(directory, "", mesh)
    operations: list[tuple[float, str, str]] = []
    fsync = os.fsync

    def note_fsync(handle: int) -> None:
        fsync(handle)
        operations.append((time.monotonic(), "fsync", os.readlink(f"/proc/self/fd/{handle}")))

    def note_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            operations.append((time.monotonic(), "rename", str(arguments[0])))

    os.fsync = note_fsync  # type: ignore[assignment]
    sys.addaudithook(note_rename)
    store.claim()
    store.save(state)
    return operations


def test_every_byte_is_on_disk_before_the_final_rename(saved: tuple[Path, list[list[Any]]]) -> None:
    directory, operations = saved
    kinds = [(kind, Path(path)) for _, kind, path in operations]
    temporary, final = directory / ".writing_iteration_00000000", directory / "iteration_00000000"
    renamed = kinds.index(("rename", temporary))
    before = {path for kind, path in kinds[:renamed] if kind == "fsync"}
    assert before >= {temporary / name for name in (*read_manifest(final), MANIFEST, "tensors", ".")}
    manifest = kinds.index(("fsync", temporary / MANIFEST))
    assert all(("fsync", temporary / name) in kinds[:manifest] for name in read_manifest(final))


def test_the_rename_is_on_disk_before_latest_points_to_it(saved: tuple[Path, list[list[Any]]]) -> None:
    directory, operations = saved
    kinds = [(kind, Path(path)) for _, kind, path in operations]
    renamed = kinds.index(("rename", directory / ".writing_iteration_00000000"))
    pointed = kinds.index(("rename", directory / ".writing_latest"))
    assert ("fsync", directory) in kinds[renamed:pointed]
    assert ("fsync", directory) in kinds[pointed:]
    assert ("fsync", directory.parent) in kinds[:renamed], "the directory itself is new"
