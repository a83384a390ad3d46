"""A store that is cut short or has a flipped byte is never taken for a good one."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hstu.data.store as store_module
from hstu.config.errors import DataError
from hstu.data.store import SequenceStore

MakeStore = Callable[..., SequenceStore]


@pytest.fixture
def good(make_store: MakeStore) -> SequenceStore:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 9, length).tolist() for length in (3, 1, 40, 7)]
    actions = [[value % 3 for value in row] for row in items]
    return make_store(items, actions=actions, context={"age": [1, 0, 1, 2]})


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


def test_any_flipped_byte_of_a_small_store_is_found_on_opening(good: SequenceStore) -> None:
    chance = random.Random(0)
    for file in sorted(good.path.iterdir()):
        size = file.stat().st_size
        positions = {*chance.sample(range(size), min(size, 50)), *range(size - 90, size)}  # the end: the seal itself
        whole = file.read_bytes()
        for position in sorted(positions - set(range(-90, 0))):
            flip(file, position)
            with pytest.raises(
                DataError, match=r"damaged|incomplete|cannot be read|does not describe|version"
            ) as raised:
                SequenceStore.open(good.path)
            assert "Make it with" in str(raised.value), (file.name, position)
            file.write_bytes(whole)
    SequenceStore.open(good.path).verify_contents()


def test_any_file_cut_short_is_found_on_opening(good: SequenceStore) -> None:
    for file in sorted(good.path.iterdir()):
        whole = file.read_bytes()
        for size in {0, 1, len(whole) // 2, len(whole) - 1}:
            os.truncate(file, size)
            with pytest.raises(DataError, match=file.name.replace(".", r"\.")):
                SequenceStore.open(good.path)
            file.write_bytes(whole)


def test_in_a_large_file_a_flipped_byte_is_found_by_verifying(
    good: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_HASHED_ON_OPENING", 0)
    file = good.path / "sequence.timestamp.npy"
    flip(file, file.stat().st_size - 8)  # the last second of the last event: in order, as far as its value tells
    opened = SequenceStore.open(good.path)
    opened.verify_values()
    with pytest.raises(DataError, match=r"sequence\.timestamp\.npy is damaged: its SHA-256 is"):
        opened.verify_contents()


def test_stores_of_before_the_checksums_are_still_read(good: SequenceStore) -> None:
    meta = json.loads((good.path / "meta.json").read_text())
    del meta["sha256"]
    for file in meta["files"].values():
        del file["sha256"]
    (good.path / "meta.json").write_text(json.dumps(meta))
    SequenceStore.open(good.path).verify_contents()


def test_a_store_whose_description_lies_is_refused(good: SequenceStore, tmp_path: Path) -> None:
    meta = json.loads((good.path / "meta.json").read_text())
    del meta["sha256"]  # an old store, so that it is the lie that is found
    lies: list[dict[str, object]] = [
        {"num_users": -1},
        {"num_users": "four"},
        {"num_events": 10**18},
        {"features": []},
        {"features": None},
        {"features": [{"name": "x"}]},
        {"files": {}},
        {"files": {"offsets.npy": None}},
        {"files": []},
        {"statistics": None, "files": 3},
    ]
    for lie in lies:
        liar = tmp_path / "liar"
        shutil.copytree(good.path, liar)
        (liar / "meta.json").write_text(json.dumps(meta | lie))
        with pytest.raises(DataError):
            SequenceStore.open(liar).verify_contents()
        shutil.rmtree(liar)
