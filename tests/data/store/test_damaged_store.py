"""A store that is cut short or has a flipped byte is never taken for a good one."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

import hstu.data.store.sequence_store as store_module
from hstu.base.errors import DataError
from hstu.base.files import sha256
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import StoreWriter
from tests.conftest import MakeStore
from tests.data.store.test_store import describe
from tests.helpers import flip


@pytest.fixture
def good(make_store: MakeStore) -> SequenceStore:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 9, length).tolist() for length in (3, 1, 40, 7)]
    actions = [[value % 3 for value in row] for row in items]
    tags = [[code % 4] * (1 + code % 3) for code in range(9)]
    return make_store(
        items,
        actions=actions,
        context={"age": [1, 0, 1, 2]},
        item_features={"tags": tags, "year": list(range(9))},
        event_features={"device": actions},
        num_items=9,
    )


def test_any_flipped_byte_of_a_small_store_is_found_on_opening(good: SequenceStore) -> None:
    chance = random.Random(0)
    for file in sorted(good.path.iterdir()):
        size = file.stat().st_size
        positions = {*chance.sample(range(size), min(size, 8))}
        if file.name == "meta.json":
            positions |= {*range(size - 90, size, 5)}  # the seal itself
        whole = file.read_bytes()
        for position in sorted(positions):
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


FEATURE = {"name": "item_id", "role": "item", "dtype": "<i4", "cardinality": 9, "has_vocab": False}
LIES: dict[str, tuple[dict[str, object], str]] = {
    "other counts": ({"num_users": 3}, r"does not describe offsets\.npy with 4 values"),
    "an absent list": (
        {"features": [FEATURE, FEATURE | {"name": "gone", "role": "item_feature", "is_list": True}]},
        r"does not describe item\.gone\.npy",
    ),
    "single values that are a list": (
        {"features": [FEATURE, FEATURE | {"name": "tags", "role": "item_feature"}]},
        r"does not describe item\.tags\.npy with 9 values",
    ),
    "no items": ({"features": []}, "is incomplete"),
    "no features": ({"features": None}, "is incomplete"),
    "no files": ({"files": []}, r"it\.files is \[\]"),
    "no version": ({"version": None}, "is damaged: .*it.version is None"),
    "a file elsewhere": (
        {"files": {"../x.npy": {"bytes": 1, "length": 1, "dtype": "<i4", "sha256": "0"}}},
        "is damaged: .*lists '../x.npy'",
    ),
    "a file without a checksum": (
        {"files": {"offsets.npy": {"dtype": "<i8", "length": 4, "bytes": 160}}},
        r"it\.files\.offsets\.npy has no 'sha256'",
    ),
    "ranges without numbers": ({"ranges": {"price": {"1..2": 10**400}}}, "is incomplete"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_lies_is_refused_though_its_checksum_is_right(lie: str, good: SequenceStore) -> None:
    change, message = LIES[lie]
    describe(good.path, **change)
    with pytest.raises(DataError, match=message) as raised:
        SequenceStore.open(good.path)
    assert "meta.json" in str(raised.value) and "Make it with" in str(raised.value)


def test_damage_of_a_shard_names_it(make_store: MakeStore) -> None:
    good = make_store([[1], [2, 2], [3, 0], [1]], num_items=4, shards=2)
    file = good.path / "shard.00001" / "sequence.item_id.npy"
    whole = file.read_bytes()
    flip(file, 1)
    with pytest.raises(DataError, match=r"shard\.00001/sequence\.item_id\.npy is damaged"):
        SequenceStore.open(good.path).sequence("item_id")[-1]
    file.write_bytes(whole)
    flip(file, len(whole) - 1)
    with pytest.raises(DataError, match=r"shard\.00001/sequence\.item_id\.npy is damaged: values outside"):
        SequenceStore.open(good.path).verify_values()
    with pytest.raises(DataError, match=r"shard\.00001/sequence\.item_id\.npy is damaged: its SHA-256"):
        SequenceStore.open(good.path).verify_contents()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard\.00001/sequence\.item_id\.npy is damaged: it has"):
        SequenceStore.open(good.path)
    file.unlink()
    with pytest.raises(DataError, match=r"shard\.00001/sequence\.item_id\.npy is damaged: it is missing"):
        SequenceStore.open(good.path)


@pytest.mark.parametrize("users", [[0, 3, 4], [0, 2], [0, 4, 4], [], [1, 2, 4], [0, 2, 5], [0, 1, 2, 4]])
def test_shards_that_do_not_fit_the_users_are_refused(users: list[int], make_store: MakeStore) -> None:
    good = make_store([[1], [2, 2], [3, 0], [1]], num_items=4, shards=2)
    shards = json.loads((good.path / "meta.json").read_text())["shards"]
    describe(good.path, shards=shards | {"users": users})
    with pytest.raises(DataError, match=r"meta\.json is (damaged|incomplete)"):
        SequenceStore.open(good.path)


def test_raw_ids_that_are_no_text_are_told_when_they_are_read(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", name="toy", command=None) as writer:
        writer.write_offsets(np.array([0, 1]))
        writer.create_sequence("item", "item", cardinality=1, length=1)[:] = 0
        writer.create_sequence("town", "context", cardinality=2, length=1)[:] = 0
        writer.write_vocabulary("town", ["Köln", "Ulm"])
        writer.write_vocabulary("user_id", np.array([7]))
    file = "vocabulary.town.utf8.npy"
    np.save(tmp_path / "s" / file, np.full(8, 0xFF, np.uint8))
    files = json.loads((tmp_path / "s" / "meta.json").read_text())["files"]
    files[file]["sha256"] = sha256(tmp_path / "s" / file)
    describe(tmp_path / "s", files=files)
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        SequenceStore.open(tmp_path / "s").raw_ids("town")
