"""Runs on data that says itself which events are train, valid and test."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config.args import Task
from hstu.config.run_config import RunConfig
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.preprocess.starter import write_starters
from hstu.data.sampling.sampler import START
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.sources import open_source
from tests.train.test_starter_files import SHORT, read
from tests.train.tiny import run, walks

TASKS: tuple[Task, ...] = ("retrieval", "ranking")


def write_events(folder: Path, changed: int | None = None, held_out: tuple[str, ...] = ("valid", "test")) -> Path:
    """The walks of 20 users, whose last events are held out, two per split. ``changed``: place of an event from the end
    of each history that has another item."""
    rows = ["who,what,did,at,fold"]
    for user, items in enumerate(walks()["items"]):
        splits = ["train"] * len(items) + [split for split in held_out for _ in range(2)]
        items = [*items, *((items[-1] + place) % 11 for place in range(1, 2 * len(held_out) + 1))]
        for place, (item, split) in enumerate(zip(items, splits, strict=True)):
            if changed is not None and place == len(items) - changed:
                item = (item + 5) % 11
            rows.append(f"{user},{item},{item % 4},{1000 + place},{split}")
    folder.mkdir(exist_ok=True)
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    columns = InteractionColumns(
        interactions=folder / "events.csv", user="who", item="what", action="did", time="at", split="fold"
    )
    return import_interactions("walks", columns, output=folder / "store")


def starter(store: Path, task: Task, *bindings: str) -> RunConfig:
    """The starter file of a store, shortened and with further bindings."""
    list(write_starters(SequenceStore.open(store), store))
    places = [f"TrainerArgs.{name} = '{store.parent}/{task}/{name}'" for name in ("output_dir", "ckpt_save_dir")]
    return read(store.with_name(f"{store.name}_{task}.gin"), task, [*SHORT, *places, *bindings])


@pytest.mark.parametrize("task", TASKS)
def test_the_starter_file_trains_and_evaluates_each_split(
    tmp_path: Path, task: Task, mesh: Mesh, warnings_of_hstu: pytest.LogCaptureFixture
) -> None:
    store = write_events(tmp_path)
    finished = run(starter(store, task), mesh)
    assert {split for _, split in finished.evaluations[:-1]} == {"valid"}, "the best state is chosen by valid"
    assert finished.evaluations[-1][1] == "test"
    assert "split by column 'fold' of the data, in events: 142 train, 40 valid, 40 test" in warnings_of_hstu.text
    labels = "40 samples" if task == "retrieval" else "20 samples"
    assert f"test: 20 users, {labels}, 0 dropped_short" in warnings_of_hstu.text


@pytest.mark.parametrize("held_out", ["valid", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_one_held_out_split_is_evaluated_during_and_after_training(
    tmp_path: Path, task: Task, held_out: str, mesh: Mesh
) -> None:
    source = open_source(starter(write_events(tmp_path, held_out=(held_out,)), task), mesh)
    assert source.eval_splits == source.final_splits == (held_out,)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_held_out_changes_no_training_batch(tmp_path: Path, task: Task, mesh: Mesh) -> None:
    uniform = ("RetrievalArgs.negatives = 'uniform'", "RetrievalArgs.num_negatives = 4") if task == "retrieval" else ()
    more = ("DatasetArgs.max_sequence_length = 4", "DatasetArgs.window_stride = 2", *uniform)

    def batches(name: str, changed: int | None) -> list[tuple[Any, ...]]:
        """What those of the first epochs hold."""
        source = open_source(starter(write_events(tmp_path / name, changed), task, *more), mesh)
        return [
            (batch.features.values(), batch.features.lengths(), batch.labels, batch.items.timestamps)
            for batch in islice(source.train_batches(START), 3 * source.batches_per_epoch)
        ]

    original = batches("original", None)
    for name, changed, equal in (("test", 1, True), ("valid", 3, True), ("train", 5, False)):
        same = [all(map(torch.equal, *pair)) for pair in zip(original, batches(name, changed), strict=True)]
        assert all(same) if equal else not any(same), name
