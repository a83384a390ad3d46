"""Gin files train as they are: those that preprocessing writes, our examples, and a suite of a user's own.

HSTU_PEER_GIN_FILES names a directory of such a suite, as NVIDIA's examples publish them; tests/config/users has
imitations.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config.args import DatasetArgs, Task
from hstu.config.gin_io import load, read_and_check
from hstu.config.rules import validate
from hstu.config.run_config import RunConfig
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.spec import Schema
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.preprocess.starter import write_starters
from hstu.data.sampling.sampler import START
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.sources import open_source
from scripts.preprocess_dataset import main
from scripts.preprocess_dataset import main as preprocess
from tests.config.gin_files import ALL_RULES, write
from tests.config.test_shipped_configs import FILES, task_of
from tests.conftest import REPOSITORY, MakeStore, write_small_store
from tests.scripts.test_pages import SHOP, written
from tests.train.tiny import run, walks

SHORT = ("TrainerArgs.num_train_epochs = 2", "TrainerArgs.tensorboard = False", 'TrainerArgs.progress_bar = "off"')


def read(file: Path, task: Task, bindings: Sequence[str] = ()) -> RunConfig:
    config, warnings = read_and_check([str(file)], bindings, task, 1, ALL_RULES)
    assert not warnings
    return config


@pytest.fixture
def odd_names(tmp_path: Path) -> Path:
    """A store whose columns and ids have all the characters that people use."""
    rows = ['"größe, €",e-mail,1st.col,at,ja/nein']
    for user, row in enumerate(walks()["items"]):
        rows += [f'"item, ""{item}"" ☃",u{user}@x.org,{item % 3},{1000 + at},no' for at, item in enumerate(row)]
    (tmp_path / "events.csv").write_text("\n".join(rows), encoding="utf-8")
    users = [f"u{user}@x.org,Köln-{user % 3}" for user in range(20)]
    (tmp_path / "users.csv").write_text("\n".join(["e-mail,größe  €", *users]), encoding="utf-8")
    columns = InteractionColumns(
        interactions=tmp_path / "events.csv",
        user="e-mail",
        item="größe, €",
        action="1st.col",
        time="at",
        context=tmp_path / "users.csv",
        context_columns=("e-mail", "größe  €"),
    )
    return import_interactions("odd", columns, output=tmp_path / "odd.v1")


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_a_starter_file_trains_whatever_the_columns_are_called(
    odd_names: Path, task: Task, mesh: Mesh, tmp_path: Path
) -> None:
    store = SequenceStore.open(odd_names)
    lines = list(write_starters(store, odd_names))
    file = tmp_path / f"odd.v1_{task}.gin"
    assert f"train {task}: python pretrain_gr_{task}.py --gin-config-file {file}" in lines
    places = (f"TrainerArgs.output_dir = '{tmp_path}/run'", f"TrainerArgs.ckpt_save_dir = '{tmp_path}/checkpoints'")
    config = read(file, task, (*SHORT, *places))
    rows = {table.feature_names[0]: table.item_vocab_size_or_capacity for table in config.embeddings}
    expected = {"größe, €": 11 + 8, "größe  €": 3 + 8, "1st.col": 3}
    assert rows == expected, "one table per feature that users share, with rows to spare for all but the actions"
    finished = run(config, mesh)
    assert finished.losses and (tmp_path / "checkpoints" / "latest").exists()


def test_features_of_items_and_events_are_used_and_none_of_an_event_is_shown_to_its_prediction(
    mesh: Mesh, tmp_path: Path
) -> None:
    data = walks() | {"item_features": {"genres": [[1, 0], [1]] * 5 + [[2]]}}
    data["event_features"] = {"watched": [[1] * len(row) for row in data["items"]]}
    data["event_numbers"] = {"seconds": [np.arange(len(row)) for row in data["items"]]}
    data["item_numbers"] = {"vector": np.arange(22).reshape(11, 2)}
    store = write_small_store(tmp_path / "toy", **data)
    list(write_starters(store, store.path))
    config = read(tmp_path / "toy_ranking.gin", "ranking", SHORT)
    assert isinstance(config.dataset, DatasetArgs)
    assert config.dataset.side_feature_names == ["genres", "vector", "watched", "seconds"]
    assert config.dataset.known_after == ["watched", "seconds"]
    assert [each.feature_names for each in config.numbers] == [["seconds"], ["vector"]]
    places = (f"TrainerArgs.output_dir = '{tmp_path}/run'", f"TrainerArgs.ckpt_save_dir = '{tmp_path}/checkpoints'")
    assert run(read(tmp_path / "toy_ranking.gin", "ranking", (*SHORT, *places)), mesh).losses


@pytest.mark.parametrize(
    ("actions", "head", "metrics"),
    [
        ([0, 1], [64, 1], ("AUC", "GAUC", "LOGLOSS")),
        ([1, 5], [64, 5], ("AUC", "ACC", "LOGLOSS")),
        ([0, 4], [64, 5], ("AUC", "ACC", "LOGLOSS")),
    ],
)
def test_the_head_fits_the_actions(
    make_store: MakeStore, tmp_path: Path, actions: list[int], head: list[int], metrics: tuple[str, ...]
) -> None:
    store = make_store([[0, 1]] * 3, actions=[actions] * 3)
    list(write_starters(store, tmp_path / "toy"))
    task = read(tmp_path / "toy_ranking.gin", "ranking").task_args
    assert (task.prediction_head_arch, task.eval_metrics) == (head, metrics)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"items": [[0, 1]] * 2}, "no starter file for retrieval: no user has 3 events"),
        ({"items": [[0, 1, 2]] * 2}, "no starter file for ranking: the data has no action"),
        ({"items": [[0, 1]] * 2, "actions": [[1, 1]] * 2}, "'action' is always 1"),
        ({"items": [[0, 1]] * 2, "actions": [[1, 5000]] * 2}, "'action' goes up to 5,000"),
        ({"items": [[0, 1]], "actions": [[1, 2]]}, "the data has only one"),
    ],
)
def test_a_task_that_the_data_does_not_allow_has_no_file(
    make_store: MakeStore, tmp_path: Path, data: dict[str, Any], reason: str
) -> None:
    lines = list(write_starters(make_store(**data), tmp_path / "toy"))
    (line,) = [line for line in lines if reason in line]
    task = "retrieval" if "retrieval" in line else "ranking"
    assert not (tmp_path / f"toy_{task}.gin").exists()


def test_histories_of_three_events_are_evaluated_on_the_last_alone(make_store: MakeStore, tmp_path: Path) -> None:
    list(write_starters(make_store([[0, 1, 2]] * 2), tmp_path / "toy"))
    assert read(tmp_path / "toy_retrieval.gin", "retrieval").dataset.valid_items == 0  # type: ignore[union-attr]


def test_the_sizes_follow_from_the_data(make_store: MakeStore, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 40, (500, 30)).tolist(), rng.integers(0, 6000, (3000, 5)).tolist()
    context = {"town": [user % 100 for user in range(500)], "street": [user % 101 for user in range(500)]}
    stores = {
        "long": make_store(long, context=context, item_features={"genre": list(range(40))}),
        "short": make_store([*short, list(range(260))], num_items=6001),
    }
    sizes = {}
    for name, store in stores.items():
        for suffix in ("", "_quick"):
            list(write_starters(store, tmp_path / name, quick=bool(suffix)))
            config = read(tmp_path / f"{name}_retrieval{suffix}.gin", "retrieval")
            network, trainer, retrieval = config.network, config.trainer, config.retrieval
            assert isinstance(config.dataset, DatasetArgs) and retrieval and trainer.early_stop_patience
            assert config.dataset.contextual_feature_names == ["town"] * (name == "long"), "5 users share a town"
            shape = (network.num_layers, network.hidden_size, config.dataset.max_sequence_length)
            run_length = (trainer.train_batch_size, trainer.num_train_epochs)
            sizes[name + suffix] = (*shape, network.hidden_dropout, *run_length, retrieval.item_tower)
    assert sizes == {
        "long": (4, 64, 30, 0.5, 16, 40, True),
        "long_quick": (2, 64, 30, 0.5, 16, 15, True),
        "short": (2, 256, 5, 0.5, 32, 31, False),
        "short_quick": (2, 64, 5, 0.5, 32, 5, False),
    }


def test_histories_beyond_the_longest_are_trained_on_in_random_windows(make_store: MakeStore, tmp_path: Path) -> None:
    for name, length in (("some", 240), ("many", 260)):  # a sixth of the events is beyond, and more than a fifth
        list(write_starters(make_store([[event % 50 for event in range(length)]] * 20), tmp_path / name))
        config = read(tmp_path / f"{name}_retrieval.gin", "retrieval")
        assert isinstance(config.dataset, DatasetArgs) and config.dataset.has_random_windows == (name == "many")


def test_an_edited_file_is_never_replaced(make_store: MakeStore, tmp_path: Path) -> None:
    store, file = make_store([[0, 1, 2, 3]] * 2), tmp_path / "toy_retrieval.gin"
    list(write_starters(store, tmp_path / "toy"))
    as_written = file.read_text()
    assert "kept" not in next(write_starters(store, tmp_path / "toy")), "unchanged"
    file.write_text("# mine")
    assert next(write_starters(store, tmp_path / "toy")).endswith("(edited, kept)")
    assert not file.with_name("toy_retrieval.gin.new").exists()
    os.utime(file, (0, 0))  # as after --force
    new = file.with_name("toy_retrieval.gin.new")
    assert next(write_starters(store, tmp_path / "toy")).endswith(f"for a new run: {new})")
    assert (file.read_text(), new.read_text()) == ("# mine", as_written)


def test_quick_files_stand_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("events.csv").write_text(
        "u,i\n" + "".join(f"{user},{item}\n" for user in range(9) for item in range(user, 12))
    )
    options = "--dataset_name mine --interactions events.csv --user u --item i --output mine"
    assert main(options.split()) == main([*options.split(), "--quick"]) == 0
    assert {file.name for file in tmp_path.glob("*.gin")} == {"mine_retrieval.gin", "mine_retrieval_quick.gin"}


EXAMPLES = sorted((REPOSITORY / "configs" / "examples").glob("*.gin"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 80 shoppers, made as docs/tutorials/a_shop.md says."""
    place = tmp_path_factory.mktemp("shop")
    smaller = written(SHOP, "SCRIPT").replace("range(1500)", "range(80)")
    subprocess.run([sys.executable, "-c", smaller], cwd=place, check=True)
    columns = "--user shopper --item sku --action what --time at --event_columns device --item_columns category,price"
    files = [f"--{name}={place / file}.csv" for name, file in
             (("interactions", "events"), ("items", "items"), ("requests", "impressions"))]  # fmt: skip
    told = [*files, *columns.split(), "--numbers", "price", "--request", "request", "--output", str(place / "store")]
    assert preprocess(["--dataset_name", "shop", *told]) == 0
    return place / "store"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_trains(file: Path, shop: Path, mesh: Mesh, tmp_path: Path) -> None:
    bindings = [
        f"DatasetArgs.dataset_path = {str(shop)!r}",
        f"TrainerArgs.output_dir = {str(tmp_path / 'run')!r}",
        f"TrainerArgs.ckpt_save_dir = {str(tmp_path / 'checkpoints')!r}",
        "TrainerArgs.num_train_epochs = None",
        "TrainerArgs.max_train_iters = 12",
        "TrainerArgs.log_interval = 1",
        "TrainerArgs.train_batch_size = 16",
        "OptimizerArgs.learning_rate = 0.01",
    ]
    task = "ranking" if "ranking" in file.stem else "retrieval"
    config, warnings = read_and_check([str(file)], bindings, task, 1, ALL_RULES)  # type: ignore[arg-type]
    assert not warnings
    finished = run(config, mesh)
    assert np.mean(finished.losses[-3:]) < np.mean(finished.losses[:3])
    assert all(0 <= value <= 1 for value in finished.metrics.values())


PEERS = sorted(Path(os.environ.get("HSTU_PEER_GIN_FILES", "/nowhere")).glob("*.gin"))
SMALL = (
    "NetworkArgs.num_layers = 1", "NetworkArgs.hidden_size = 16", "NetworkArgs.num_attention_heads = 2",
    "NetworkArgs.kv_channels = 8", "NetworkArgs.dtype_str = 'float32'", "TrainerArgs.train_batch_size = 2",
    "TrainerArgs.eval_batch_size = 20", "TrainerArgs.max_train_iters = 2", "TrainerArgs.max_eval_iters = 1",
)  # fmt: skip


def write_data(dataset_name: str) -> None:
    """A few users with the features of the data set, where a run without dataset_path looks for it."""
    name = resolve_name(dataset_name) or dataset_name
    own = Schema(item="ad", action="clicked", context=("site",), action_cardinality=2)
    schema = DATASETS[name].schema if name in DATASETS else own
    items = [[(user + place) % 11 for place in range(30)] for user in range(20)]
    actions = [[37 * item % (schema.action_cardinality or 2) for item in row] for row in items]  # all bits of 256
    write_small_store(
        Path("tmp_data") / name, items, name=name, actions=actions, num_actions=schema.action_cardinality,
        item_feature=schema.item, action_feature=schema.action or "", context=dict.fromkeys(schema.context, range(20)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [pytest.param(FILES, id="imitations"), pytest.param(PEERS, id="peers", marks=pytest.mark.skipif(
        not PEERS, reason="HSTU_PEER_GIN_FILES names no directory with gin files of another trainer"))],
)  # fmt: skip
def test_each_file_of_a_suite_runs_twice(
    files: list[Path], mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        text = re.sub(r"(?<![.\d])(?!9{9}\b)\d{4,}\b", "1000", file.read_text())  # sizes that a test can hold
        for number in range(2):
            config = load([write(tmp_path, text)], SMALL, task_of(file))
            validate(config, world_size=1, rules=ALL_RULES)
            if isinstance(dataset := config.dataset, DatasetArgs):
                config = replace(config, dataset=replace(dataset, dataset_path=None))
                if not number:
                    write_data(dataset.dataset_name)
            if config.trainer.saves_checkpoints:
                own = replace(config.trainer, ckpt_save_dir=f"{file.stem}_{number}")
                config = replace(config, trainer=own)
            finished = run(config, mesh)
            assert finished.losses and np.isfinite(finished.losses).all(), file
            assert finished.summary["status"] == "done" and None not in finished.metrics.values(), file
    assert not Path("checkpoints").exists()


# --- data that says itself which events are train, valid and test ---

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
