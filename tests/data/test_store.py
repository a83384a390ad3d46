import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hstu.config.errors import DataError
from hstu.data.store import SequenceStore, sealed
from hstu.data.store_writer import StoreWriter
from tests.conftest import REPOSITORY

MakeStore = Callable[..., SequenceStore]
ITEMS = [[3, 1], [0, 2, 2], [1]]
ACTIONS = [[1, 0], [4, 4, 2], [1]]


def test_a_store_gives_back_what_was_written(make_store: MakeStore) -> None:
    store = make_store(ITEMS, actions=ACTIONS, timestamps=[[5, 5], [1, 2, 9], [0]], context={"age": [1, 0, 1]})

    assert (store.num_users, store.num_events) == (3, 6)
    assert store.offsets().tolist() == [0, 2, 5, 6]
    assert store.sequence("item_id").tolist() == [3, 1, 0, 2, 2, 1]
    assert store.sequence("action").tolist() == [1, 0, 4, 4, 2, 1]
    assert store.sequence("timestamp").tolist() == [5, 5, 1, 2, 9, 0]
    assert store.context("age").tolist() == [1, 0, 1]
    assert (store.item_feature, store.action_feature, store.timestamp_feature) == ("item_id", "action", "timestamp")
    assert store.contextual_features == ("age",)
    assert [store.cardinality(name) for name in ("item_id", "action", "age", "user_id")] == [4, 5, 2, 3]
    assert store.sequence("item_id").dtype == np.int32 and store.sequence("timestamp").dtype == np.int64
    assert store.titles() is None


def test_raw_ids_and_codes_map_both_ways(make_store: MakeStore) -> None:
    store = make_store(ITEMS)
    assert store.raw_ids("item_id").tolist() == [1000, 1001, 1002, 1003]
    assert store.encode("item_id", [1003, 1000]).tolist() == [3, 0]
    assert store.encode("user_id", [102]).tolist() == [2]
    assert store.encode("item_id", []).tolist() == []
    with pytest.raises(DataError, match=r"2 raw id\(s\) not in the vocabulary of 'item_id': 3, 999999"):
        store.encode("item_id", [1000, 3, 999_999])
    with pytest.raises(DataError, match="are int64"):
        store.encode("item_id", [1000.5])


def test_strings_keep_every_character(tmp_path: Path) -> None:
    names = sorted(["", "a", "a\0", "ä€𝄞", 'quote " comma ,', "line\nbreak"])
    with StoreWriter(tmp_path / "s", name="strings", command=None) as writer:
        writer.write_offsets(np.array([0, len(names)]))
        writer.create_sequence("item", "item", cardinality=len(names), length=len(names))[:] = range(len(names))
        writer.write_vocabulary("item", names)
        writer.write_vocabulary("user_id", np.array([-(2**63)]))
        writer.write_titles(name.upper() for name in names)
    store = SequenceStore.open(tmp_path / "s")
    assert store.raw_ids("item").tolist() == names
    assert store.encode("item", names[::-1]).tolist() == list(range(len(names)))[::-1]
    assert store.encode("user_id", [-(2**63)]).tolist() == [0]
    titles = store.titles()
    assert titles is not None and titles.tolist() == [name.upper() for name in names]


def test_arrays_are_mapped_not_read_and_cannot_be_written(make_store: MakeStore) -> None:
    values = make_store(ITEMS).sequence("item_id")
    assert isinstance(values.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_a_pickled_store_reopens_by_its_path(make_store: MakeStore) -> None:
    store = make_store([list(range(50_000))])
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert (pickle.loads(pickled).sequence("item_id") == store.sequence("item_id")).all()


def test_opening_does_not_depend_on_the_size(make_store: MakeStore) -> None:
    def best_of_20(path: Path) -> float:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            SequenceStore.open(path)
            times.append(time.perf_counter() - begin)
        return min(times)

    small = make_store([[0]])
    large = make_store(np.zeros((20_000, 100), dtype=np.int64).tolist())
    assert best_of_20(large.path) < 0.05 + 3 * best_of_20(small.path)


def test_asking_for_a_feature_in_the_wrong_way_names_the_right_one(make_store: MakeStore) -> None:
    store = make_store(ITEMS, context={"age": [1, 0, 1]})
    with pytest.raises(DataError, match="no feature 'movie'; it has: age, item_id, timestamp"):
        store.sequence("movie")
    with pytest.raises(DataError, match=r"use context\('age'\)"):
        store.sequence("age")
    with pytest.raises(DataError, match=r"use sequence\('item_id'\)"):
        store.context("item_id")
    with pytest.raises(DataError, match="no cardinality"):
        store.cardinality("timestamp")
    with pytest.raises(DataError, match="no vocabulary"):
        store.raw_ids("age")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "sequence.item_id.npy": lambda file: os.truncate(file, file.stat().st_size - 4),
    "sequence.action.npy": lambda file: file.unlink(),
    "context.age.npy": lambda file: np.save(file, np.zeros(6, dtype=np.int16)),
    "offsets.npy": lambda file: np.save(file, np.array([0, 5, 2, 6])),
    "meta.json": lambda file: file.write_text('{"format": '),
    "vocabulary.item_id.npy": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
}


@pytest.mark.parametrize("file", DAMAGES)
def test_damage_is_found_on_opening_and_the_file_and_remedy_are_named(make_store: MakeStore, file: str) -> None:
    store = make_store(ITEMS, actions=ACTIONS, context={"age": [1, 0, 1]})
    DAMAGES[file](store.path / file)
    with pytest.raises(DataError) as raised:
        SequenceStore.open(store.path)
    assert file in str(raised.value)
    assert "Make it with: python scripts/preprocess_dataset.py" in str(raised.value)
    assert ("first move" if file == "meta.json" else "--force") in str(raised.value)


def describe(store: SequenceStore, **changes: object) -> None:
    """Changes a store's description, with a right checksum."""
    meta = json.loads((store.path / "meta.json").read_text())
    del meta["sha256"]
    (store.path / "meta.json").write_text(sealed(meta | changes))


def test_a_recorded_command_is_the_remedy(make_store: MakeStore) -> None:
    store = make_store(ITEMS)
    describe(store, command="make it so")
    (store.path / "offsets.npy").unlink()
    with pytest.raises(DataError, match=r"offsets\.npy is damaged: it is missing\. Make it with: make it so --force"):
        SequenceStore.open(store.path)


def test_a_store_of_a_newer_program_is_told_from_a_damaged_one(make_store: MakeStore) -> None:
    store = make_store(ITEMS)
    describe(store, version=99)
    with pytest.raises(DataError, match=r"version 99, and this program reads version 2: a newer program wrote it"):
        SequenceStore.open(store.path)


def test_an_absent_built_in_dataset_is_answered_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--dataset_name ml-1m --output .*/ml-1m$"):
        SequenceStore.open(tmp_path / "ml-1m")


def write_toy(target: Path, codes: list[int], cardinality: int = 9, **options: bool) -> None:
    with StoreWriter(target, name="toy", command=None, **options) as writer:
        writer.write_offsets(np.array([0, len(codes)]))
        writer.create_sequence("item", "item", cardinality=cardinality, length=len(codes))[:] = codes
        writer.write_vocabulary("user_id", np.array([7]))


def test_a_failing_writer_leaves_nothing_and_the_old_store_as_it_was(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", [1, 2])
    with pytest.raises(DataError, match=r"outside \[0, 9\)"):
        write_toy(tmp_path / "toy", [1, 9], overwrite=True)
    assert os.listdir(tmp_path) == ["toy"]
    assert SequenceStore.open(tmp_path / "toy").sequence("item").tolist() == [1, 2]


def test_overwriting_replaces_the_store_whole(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", [1, 2])
    with pytest.raises(DataError, match="--force replaces it"):
        write_toy(tmp_path / "toy", [3])
    old = SequenceStore.open(tmp_path / "toy")
    write_toy(tmp_path / "toy", [3], overwrite=True)
    assert SequenceStore.open(tmp_path / "toy").sequence("item").tolist() == [3]
    assert old.sequence("item").tolist() == [1, 2], "an open store stays readable"
    assert os.listdir(tmp_path) == ["toy"]


def contents(folder: Path) -> dict[str, bytes]:
    """Path → content of each file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


NOT_REPLACED: dict[str, tuple[Callable[[SequenceStore], object], str]] = {
    "no meta.json": (lambda store: (store.path / "meta.json").unlink(), "it has no meta.json"),
    "a user's meta.json": (
        lambda store: (store.path / "meta.json").write_text('{"title": "years of work"}'),
        "does not describe a sequence store",
    ),
    "a changed meta.json": (
        lambda store: (store.path / "meta.json").write_text(
            (store.path / "meta.json").read_text().replace("toy", "joy")
        ),
        "its checksum is wrong",
    ),
    "a newer version": (lambda store: describe(store, version=3), "a newer program wrote it"),
    "files beside": (lambda store: (store.path / "thesis.txt").write_text("x"), r"not of the store: thesis\.txt"),
    "a folder beside": (lambda store: (store.path / "src").mkdir(), "not of the store: src"),
}


@pytest.mark.parametrize("change", NOT_REPLACED)
def test_only_what_is_a_store_is_ever_replaced(change: str, tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", [1, 2])
    make, message = NOT_REPLACED[change]
    make(SequenceStore.open(tmp_path / "toy"))
    before = contents(tmp_path)
    with pytest.raises(DataError, match=message):
        write_toy(tmp_path / "toy", [3], overwrite=True)
    assert contents(tmp_path) == before


def test_a_file_and_a_foreign_working_directory_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("years of work")
    with pytest.raises(DataError, match="is a file"):
        write_toy(tmp_path / "toy", [3], overwrite=True)
    for name in (".other.partial", ".other.discarded"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
        with pytest.raises(DataError, match=r"\.other\.[a-z]+ is not a sequence store"):
            write_toy(tmp_path / "other", [3], overwrite=True)
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"
        (tmp_path / name / "thesis.txt").unlink()
    write_toy(tmp_path / "other", [3])


def test_a_damaged_array_does_not_hinder_the_replacement(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", [1, 2])
    (tmp_path / "toy" / "offsets.npy").write_bytes(b"")
    write_toy(tmp_path / "toy", [3], overwrite=True)
    assert SequenceStore.open(tmp_path / "toy").sequence("item").tolist() == [3]


def test_a_link_to_a_store_stays_a_link(tmp_path: Path) -> None:
    write_toy(tmp_path / "large disk" / "toy", [1, 2])
    (tmp_path / "toy").symlink_to(tmp_path / "large disk" / "toy")
    write_toy(tmp_path / "toy", [3], overwrite=True)
    assert (tmp_path / "toy").is_symlink()
    assert SequenceStore.open(tmp_path / "large disk" / "toy").sequence("item").tolist() == [3]


def test_events_out_of_time_order_are_refused(make_store: MakeStore) -> None:
    make_store([[0, 1], [2, 3]], timestamps=[[8, 9], [1, 1]])
    with pytest.raises(DataError, match="not in time order"):
        make_store([[0, 1], [2, 3]], timestamps=[[8, 9], [2, 1]])


HANGING_WRITER = """
import sys, time
import numpy as np
from hstu.data.store_writer import StoreWriter
with StoreWriter(sys.argv[1], name="toy", command=None) as writer:
    writer.write_offsets(np.array([0, 1000]))
    writer.create_sequence("item", "item", cardinality=9, length=1000)[:500] = 1
    print("half written", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_no_target_and_the_next_one_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "toy"
    writer = subprocess.Popen(
        [sys.executable, "-c", HANGING_WRITER, str(target)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "half written\n"
        with pytest.raises(DataError, match="another process is writing"):
            write_toy(target, [1])
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=10)
    assert not target.exists()
    assert os.listdir(tmp_path) == [".toy.partial"]

    write_toy(target, [1, 2, 3])
    assert SequenceStore.open(target).sequence("item").tolist() == [1, 2, 3]
    assert os.listdir(tmp_path) == ["toy"]


def test_a_path_that_no_file_system_takes_is_told() -> None:
    with pytest.raises(DataError, match=r"no preprocessed data at .*xxx\. Make it with"):
        SequenceStore.open("x" * 5000)
