import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import DataError
from hstu.base.files import sha256
from hstu.data.store import sequence_store
from hstu.data.store.meta import sealed
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import StoreWriter
from tests.conftest import REPOSITORY, MakeStore, write_item_feature

ITEMS = [[3, 1], [0, 2, 2], [1]]
GENRES = [[2, 0], [1], [1, 1, 0], [2]]


def test_a_list_and_a_feature_named_like_its_offsets_do_not_meet(make_store: MakeStore) -> None:
    store = make_store(ITEMS, item_features={"genres": GENRES, "genres.offsets": [1, 0, 0, 1]})
    assert store.item_values("genres.offsets")[0].tolist() == [1, 0, 0, 1]
    assert store.item_values("genres")[0].tolist() == [2, 0, 1, 1, 1, 0, 2]


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


def describe(store: Path, **changes: object) -> None:
    """Changes a store's description, with a right checksum."""
    meta = json.loads((store / "meta.json").read_text())
    del meta["sha256"]
    (store / "meta.json").write_text(sealed(meta | changes))


def test_a_recorded_command_is_the_remedy(make_store: MakeStore) -> None:
    store = make_store(ITEMS)
    describe(store.path, command="make it so")
    (store.path / "offsets.npy").unlink()
    with pytest.raises(DataError, match=r"offsets\.npy is damaged: it is missing\. Make it with: make it so --force"):
        SequenceStore.open(store.path)


def test_a_store_of_a_newer_program_is_told_from_a_damaged_one(make_store: MakeStore) -> None:
    store = make_store(ITEMS)
    describe(store.path, version=99)
    with pytest.raises(DataError, match=r"version 99, and this program reads version 4: a newer program wrote it"):
        SequenceStore.open(store.path)


def test_statistics_of_another_width_are_refused(make_store: MakeStore) -> None:
    store = make_store(ITEMS, item_numbers={"price": np.ones((4, 1), dtype=np.float32)})
    meta = json.loads((store.path / "meta.json").read_text())
    next(each for each in meta["features"] if each["name"] == "price")["statistics"]["std"] = []
    describe(store.path, features=meta["features"])
    with pytest.raises(DataError, match="mean and std of price do not have its width"):
        SequenceStore.open(store.path)


def test_an_absent_built_in_dataset_is_answered_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--dataset_name ml-1m --output .*/ml-1m$"):
        SequenceStore.open(tmp_path / "ml-1m")


def write_toy(target: Path, codes: list[int], cardinality: int = 9, **options: Any) -> None:
    with StoreWriter(target, name="toy", command=None, **options) as writer:
        writer.write_offsets(np.array([0, len(codes)]))
        writer.create_sequence("item", "item", cardinality=cardinality, length=len(codes))[:] = codes
        writer.write_vocabulary("user_id", np.array([7]))


def test_a_store_says_which_append_brought_an_event_and_which_states_it_had(tmp_path: Path) -> None:
    for name in ("first", "again"):
        write_toy(tmp_path / name, [1, 2])
    first, again = (SequenceStore.open(tmp_path / name) for name in ("first", "again"))
    assert (first.num_segments, first.segments(), len(first.lineage)) == (1, None, 1)
    assert first.lineage == again.lineage, "equal content is one state"
    for segments, problem in (([0, 1, 2], r"segment\.npy is damaged: values outside \[0, 2\)"), ([0, 1, 1], None)):
        with (
            pytest.raises(DataError, match=problem) if problem else nullcontext(),
            StoreWriter(tmp_path / "first", name="toy", command=None, overwrite=True) as writer,
        ):
            writer.write_offsets(np.array([0, 3]))
            writer.create_sequence("item", "item", cardinality=9, length=3)[:] = [1, 2, 3]
            writer.write_vocabulary("user_id", np.array([7]))
            writer.create_segments(2, 3)[:] = segments
            writer.earlier_states = first.lineage
    write_toy(tmp_path / "at_once", [1, 2, 3])
    grown, at_once = (SequenceStore.open(tmp_path / name) for name in ("first", "at_once"))
    assert (grown.num_segments, np.asarray(grown.segments()).tolist()) == (2, [0, 1, 1])
    assert grown.lineage == (*first.lineage, *at_once.lineage), "segments are no content"


def test_a_failing_writer_leaves_nothing_and_the_old_store_as_it_was(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", [1, 2])
    with pytest.raises(DataError, match=r"outside \[0, 9\)"):
        write_toy(tmp_path / "toy", [1, 9], overwrite=True)
    assert os.listdir(tmp_path) == ["toy"]
    assert SequenceStore.open(tmp_path / "toy").sequence("item").tolist() == [1, 2]


BAD_FEATURES: dict[str, tuple[Callable[[StoreWriter], object], str]] = {
    "an empty list": (
        lambda writer: write_item_feature(writer, "f", np.array([0, 1]), 2, np.array([0, 2, 2])),
        r"item\.f\.offsets\.npy is damaged: its values are not ascending",
    ),
    "offsets that end early": (
        lambda writer: write_item_feature(writer, "f", np.array([0, 1, 1]), 2, np.array([0, 1, 2])),
        "does not run from 0 to 3",
    ),
    "offsets of other items": (
        lambda writer: write_item_feature(writer, "f", np.array([0, 1]), 2, np.array([0, 2])),
        r"does not describe item\.f\.offsets\.npy with 3 values",
    ),
    "values of other items": (
        lambda writer: write_item_feature(writer, "f", np.array([0, 1, 1]), 2),
        r"does not describe item\.f\.npy with 2 values",
    ),
    "an item's code beyond the cardinality": (
        lambda writer: write_item_feature(writer, "f", np.array([0, 2]), 2),
        r"item\.f\.npy is damaged: values outside \[0, 2\)",
    ),
    "a list's code beyond the cardinality": (
        lambda writer: write_item_feature(writer, "f", np.array([0, 1, 2]), 2, np.array([0, 1, 3])),
        r"item\.f\.npy is damaged: values outside \[0, 2\)",
    ),
    "an event's code below 0": (
        lambda writer: writer.create_sequence("f", "event", cardinality=2, length=3).__setitem__(0, -1),
        r"sequence\.f\.npy is damaged: values outside \[0, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_a_writer_refuses_features_of_wrong_values(case: str, tmp_path: Path) -> None:
    write, message = BAD_FEATURES[case]
    with pytest.raises(DataError, match=message), StoreWriter(tmp_path / "toy", name="toy", command=None) as writer:
        writer.write_offsets(np.array([0, 3]))
        writer.create_sequence("item", "item", cardinality=2, length=3)[:] = [0, 1, 0]
        writer.write_vocabulary("user_id", np.array([7]))
        write(writer)
    assert os.listdir(tmp_path) == []


def test_a_large_list_out_of_order_is_found_by_verifying(make_store: MakeStore) -> None:
    """Between the places that opening looks at."""
    items = 5000
    store = make_store([range(items)], item_features={"tags": [[0, 1]] * items})
    file = store.path / "item.tags.offsets.npy"
    offsets = np.load(file)
    place = next(at for at in range(2, items) if at not in np.linspace(0, items, 1024, dtype=np.int64))
    offsets[place] = offsets[place - 1]
    np.save(file, offsets)
    meta = json.loads((store.path / "meta.json").read_text())
    meta["files"][file.name]["sha256"] = sha256(file)
    describe(store.path, files=meta["files"])
    opened = SequenceStore.open(store.path)
    with pytest.raises(DataError, match="an item has no values, or offsets are not ascending"):
        opened.verify_contents()


def test_overwriting_replaces_the_store_whole(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", [1, 2])
    with pytest.raises(DataError, match="--force replaces it"):
        write_toy(tmp_path / "toy", [3])
    old = SequenceStore.open(tmp_path / "toy")
    write_toy(tmp_path / "toy", [3], overwrite=True)
    assert SequenceStore.open(tmp_path / "toy").sequence("item").tolist() == [3]
    assert old.sequence("item").tolist() == [1, 2], "an open store stays readable"
    assert os.listdir(tmp_path) == ["toy"]


@pytest.mark.parametrize("lengths", [[3], [2, 1]])
def test_a_store_that_is_replaced_while_it_is_opened_is_the_new_one(
    lengths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files may have other sizes than those that the old description says, or equal ones."""
    write_toy(tmp_path / "toy", [1, 2])
    plain, calls = sequence_store.read_meta, iter([True])

    def replaced(path: Path) -> dict[str, Any]:
        meta = plain(path)
        if next(calls, False):
            write_toy(tmp_path / "toy", lengths, overwrite=True)
        return meta

    monkeypatch.setattr(sequence_store, "read_meta", replaced)
    found = SequenceStore.open(tmp_path / "toy")
    assert found.sequence("item").tolist() == lengths
    found.verify_contents()


def contents(folder: Path) -> dict[str, bytes]:
    """Path → content of each file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


NOT_REPLACED: dict[str, tuple[Callable[[SequenceStore], object], str]] = {
    "no meta.json": (lambda store: (store.path / "meta.json").unlink(), "it has no meta.json"),
    "a changed meta.json": (
        lambda store: (store.path / "meta.json").write_text(
            (store.path / "meta.json").read_text().replace("toy", "joy")
        ),
        "its checksum is wrong",
    ),
    "files beside": (lambda store: (store.path / "thesis.txt").write_text("x"), r"not of the store: thesis\.txt"),
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


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("years of work")
    with pytest.raises(DataError, match="is a file"):
        write_toy(tmp_path / "toy", [3], overwrite=True)


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
from hstu.data.store.writer import StoreWriter
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
