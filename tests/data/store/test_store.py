import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import DataError
from hstu.base.files import sha256
from hstu.data.store import meta, sequence_store
from hstu.data.store.meta import sealed
from hstu.data.store.parts import Parts
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import StoreWriter, cut_users
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
        writer.write_strings("titles", (name.upper() for name in names))
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
    with pytest.raises(DataError, match=r"version 99, and this program reads version 5: a newer program wrote it"):
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


def in_shards(make_store: MakeStore, shards: int) -> SequenceStore:
    """Users with 1 to 9 events and one with 60, and candidates of every third user."""
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 9, 60 if user == 2 else 1 + user % 9).tolist() for user in range(20)]
    requests = [(user, 2_000_000, {"item_id": [user % 9] * (1 + user % 4)}) for user in range(0, 20, 3)]
    return make_store(items, segments=items, requests=requests, num_items=9, shards=shards)


@pytest.mark.parametrize("shards", [2, 7, 64])
def test_shards_read_like_a_store_without(shards: int, make_store: MakeStore, caplog: pytest.LogCaptureFixture) -> None:
    whole, store = (in_shards(make_store, count) for count in (1, shards))
    store.verify_contents()
    assert store.num_shards == min(shards, 20) and ("there are no more users" in caplog.text) == (shards > 20)
    assert (store.checksums, store.lineage) == (whole.checksums, whole.lineage), "equal content is one state"
    copy = pickle.loads(pickle.dumps(store))
    pairs = [(whole.segments(), copy.segments()), (whole.candidates("item_id"), copy.candidates("item_id"))]
    pairs += [(whole.sequence(name), copy.sequence(name)) for name in ("item_id", "timestamp")]
    rng = np.random.default_rng(1)
    for old, new in pairs:
        assert old is not None and new is not None and (len(old), old.dtype) == (len(new), new.dtype)
        indices = rng.integers(-len(old), len(old), (9, 5))
        others: list[Any] = [rng.random(len(old)) < 0.3, slice(3, -2), slice(None, None, -4), slice(5, 2), []]
        for index in (indices, *others):
            np.testing.assert_array_equal(old[index], new[index])
        np.testing.assert_array_equal(old >= 4, new >= 4)
        np.testing.assert_array_equal(np.diff(old), np.diff(new))
        assert (old[3], old.min(), old.max(), old.tolist()) == (new[3], new.min(), new.max(), [*new])
        assert np.fmin.reduce(new) == old.min()
        for outside in (len(old), -len(old) - 1):
            with pytest.raises(IndexError):
                new[[0, outside]]
    for events in (rng.integers(0, whole.num_events, 99), np.arange(3), np.empty(0, np.int64)):
        of_whole, of_shards = whole.places(events), copy.places(events)
        for name in ("item_id", "timestamp"):
            np.testing.assert_array_equal(of_whole.of(whole.sequence(name)), of_shards.of(copy.sequence(name)))


def test_only_the_shards_that_are_read_are_opened(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = in_shards(make_store, 10).path, list[str]()
    plain = meta.open_memmap

    def noted(file: Path, mode: str) -> np.ndarray:
        opened.append(str(file))
        return plain(file, mode=mode)

    monkeypatch.setattr(meta, "open_memmap", noted)
    store = SequenceStore.open(path)
    assert not [file for file in opened if "shard." in file]
    opened.clear()
    items = store.sequence("item_id")
    for _ in range(2):
        assert items[store.offsets()[store.shard_users[4]]] in range(9)
    assert opened == [str(path / "shard.00004" / "sequence.item_id.npy")]
    items = SequenceStore.open(path, most_open=2).sequence("item_id")
    assert isinstance(items, Parts)
    opened.clear()
    for shard in (4, 5, 6, 5, 4):  # the one that was read longest ago is closed
        items.part(shard)
    assert [file[-26:-21] for file in opened] == ["00004", "00005", "00006", "00004"]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), shards=st.integers(1, 50))
def test_shards_divide_the_events_evenly(lengths: list[int], shards: int) -> None:
    offsets = np.cumsum([0, *lengths])
    users = cut_users(offsets, shards)
    assert len(users) - 1 == min(shards, len(lengths)) and (users[0], users[-1]) == (0, len(lengths))
    sizes = np.diff(offsets[users])
    assert (np.diff(users) > 0).all() and sizes.max() <= offsets[-1] / (len(users) - 1) + 2 * max(lengths)


def test_a_store_that_is_killed_as_it_is_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str) -> None:
        with StoreWriter(tmp_path / name, name="toy", command=None, resume_key="k", shards=3) as writer:
            writer.write_offsets(np.arange(0, 13, 2))
            items = writer.create_sequence("item", "item", cardinality=12, length=12)
            if "filled" not in writer.journal:
                items[:] = range(12)
                items.flush()
                writer.journal.commit("filled")
            writer.write_vocabulary("user_id", np.arange(6))

    write("at_once")
    calls = iter(range(9))
    save = np.save
    monkeypatch.setattr(np, "save", lambda *args: save(*args) if next(calls) < 1 else signal.raise_signal(2))
    with pytest.raises(KeyboardInterrupt):
        write("killed")
    monkeypatch.undo()
    write("killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "at_once") and len(os.listdir(tmp_path)) == 2


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
    plain, calls = sequence_store.describe, iter([True])

    def replaced(path: Path) -> dict[str, Any]:
        meta = plain(path)
        if next(calls, False):
            write_toy(tmp_path / "toy", lengths, overwrite=True)
        return meta

    monkeypatch.setattr(sequence_store, "describe", replaced)
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
    "files in shards": (lambda store: (store.path / "shard.00000").mkdir(), r"not of the store: shard\.00000"),
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
