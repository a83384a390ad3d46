"""What must be on the disk before what: a machine that loses its power keeps what was synchronised, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.manifest import MANIFEST, read_manifest
from tests.distributed.launch import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """Where one checkpoint has been saved by two ranks, and all ranks' fsyncs and renames in the order of time."""
    directory = tmp_path_factory.mktemp("synchronised") / "checkpoints"
    ranks = run_ranks("tests.reliability.cases:synchronised", 2, 60, directory=str(directory))
    return directory, sorted((deed for rank in ranks for deed in rank), key=lambda deed: deed[0])


def test_every_byte_is_on_the_disk_before_the_name_is_given(saved: tuple[Path, list[list[Any]]]) -> None:
    directory, deeds = saved
    kinds = [(kind, Path(path)) for _, kind, path in deeds]
    temporary, final = directory / ".writing_iteration_00000000", directory / "iteration_00000000"
    renamed = kinds.index(("rename", temporary))
    before = {path for kind, path in kinds[:renamed] if kind == "fsync"}
    assert before >= {temporary / name for name in (*read_manifest(final), MANIFEST, "tensors", ".")}
    manifest = kinds.index(("fsync", temporary / MANIFEST))
    assert all(("fsync", temporary / name) in kinds[:manifest] for name in read_manifest(final))


def test_the_name_is_on_the_disk_before_latest_points_at_it(saved: tuple[Path, list[list[Any]]]) -> None:
    directory, deeds = saved
    kinds = [(kind, Path(path)) for _, kind, path in deeds]
    renamed = kinds.index(("rename", directory / ".writing_iteration_00000000"))
    pointed = kinds.index(("rename", directory / ".writing_latest"))
    assert ("fsync", directory) in kinds[renamed:pointed]
    assert ("fsync", directory) in kinds[pointed:]
    assert ("fsync", directory.parent) in kinds[:renamed], "the directory itself is new"
