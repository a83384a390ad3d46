"""progress.json of a checkpoint whose checksums fit but whose content does not: refused, with the place."""

import json
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import DamagedCheckpoint, describe_files, write_manifest
from hstu.checkpoint.tensors import read_metadata

PROGRESS: dict[str, Any] = {
    "iteration": 4,
    "position": {"epoch": 1, "consumed": 8},
    "optimizer": {"table_steps": 4, "lr_multiplier": 1.0},
    "tables": {"item": {"rows": 3, "dim": 16, "features": ["item_id"]}},
    "features": {},
    "carried": {"history": {"last": [], "count": {"valid": 1}, "extremes": {}}},
    "world_size": 1,
}


def stored(root: Path, progress: Any) -> dict[str, Any]:
    """The metadata of a checkpoint with this progress.json, as read again."""
    (root / "progress.json").write_text(json.dumps(progress))
    write_manifest(root, describe_files(root, [root / "progress.json"]))
    return read_metadata(root)


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    assert stored(tmp_path, PROGRESS) == PROGRESS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iteration": -1}, "it.iteration is -1"),
        ({"tables": {"item": None}}, "it.tables.item is None"),
        ({"tables": {"item": {"rows": 10**30, "dim": 16, "features": []}}}, "it.tables.item.rows is 1000"),
        ({"tables": {"item": {"rows": 3, "dim": 16, "features": [4]}}}, r"it.tables.item.features\[0\] is 4"),
        ({"features": {"item": "item_id"}}, "it.features has no 'cardinalities'"),
        ({"carried": {"history": {"last": [7], "count": {}, "extremes": {}}}}, r"it.carried.history.last\[0\] is 7"),
        ({"position": []}, r"it.position is \[\]"),
        ({"trained_on": "x"}, "it.trained_on is 'x'"),
    ],
)
def test_a_part_of_another_shape_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=rf"progress.json is damaged \({message}.*Load another checkpoint"):
        stored(tmp_path, PROGRESS | changed)
