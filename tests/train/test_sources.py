"""Where batches come from: a store, a second store that numbers its ids differently, random data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config.args import (
    BenchmarkDatasetArgs,
    EmbeddingArgs,
    FeatureArgs,
    NetworkArgs,
    OptimizerArgs,
    RandomDistribution,
    RankingArgs,
    RetrievalArgs,
    TrainerArgs,
)
from hstu.config.errors import ConfigError, DataError
from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batch import NEGATIVES, HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.data.store import SequenceStore
from hstu.data.store_writer import StoreWriter
from hstu.parallel.mesh import Mesh
from hstu.train.builder import label_offset
from hstu.train.sources import RandomSource, StoreSource, open_source
from tests.train.tiny import (
    ITEMS,
    NETWORK,
    TRAINER,
    FinishedRun,
    build,
    run,
    tables_of,
    tables_with_dynamic,
    tiny_config,
    walks,
)

FIRST = SamplerPosition()


@pytest.fixture
def source(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> Callable[..., StoreSource]:
    """``source("retrieval", dataset={...})`` over the walks."""

    def open_it(task: str, *, store: SequenceStore = store, **options: Any) -> StoreSource:
        opened = open_source(tiny_config(task, store, tmp_path, **options), mesh)
        assert isinstance(opened, StoreSource)
        return opened

    return open_it


def ids(batch: HSTUBatch, feature: str) -> list[int]:
    values: list[int] = batch.features[feature].values().tolist()
    return values


# --- one store -----------------------------------------------------------------------------------------------------


def test_missing_data_is_told_where_it_should_be_and_how_to_make_it(mesh: Mesh, store: SequenceStore) -> None:
    config = tiny_config("ranking", store, "unused", dataset={"dataset_name": "shop", "dataset_path": None})
    with pytest.raises(DataError, match=r"no preprocessed data at .*tmp_data/shop.*--dataset_name NAME"):
        open_source(config, mesh)


def test_any_spelling_of_a_built_in_dataset_means_its_directory(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp_data").mkdir()
    (tmp_path / "tmp_data" / "ml-1m").symlink_to(store.path)
    monkeypatch.chdir(tmp_path)
    config = tiny_config("ranking", store, "unused", dataset={"dataset_name": "MovieLens-1M", "dataset_path": None})
    assert open_source(config, mesh).cardinalities["item_id"] == ITEMS


def test_a_built_in_dataset_has_tables_of_which_some_can_be_given_by_hand(source: Callable[..., StoreSource]) -> None:
    mine = EmbeddingArgs(
        feature_names=["item_id"],
        table_name="mine",
        item_vocab_size_or_capacity=50,
        sharding_type="data_parallel",
        init_std=0.5,
    )
    tables = source("ranking", tables=(mine,), dataset={"dataset_name": "ml-100k"}).tables
    assert {table.table_name: table.item_vocab_size_or_capacity for table in tables} == {
        "mine": 50,
        "town": 3,
        "action": 4,
    }


def test_a_built_in_dataset_trains_without_a_table_by_hand(train: Callable[..., FinishedRun]) -> None:
    finished = train("ranking", tables=(), dataset={"dataset_name": "ml-100k"})
    assert len(finished.losses) == 4


def test_a_static_table_with_too_few_rows_is_refused(store: SequenceStore, source: Callable[..., StoreSource]) -> None:
    item, *others = sorted(tables_of(store), key=lambda table: table.table_name != "item_id_table")
    small = EmbeddingArgs(
        feature_names=["item_id"], table_name="small", item_vocab_size_or_capacity=10, sharding_type="data_parallel"
    )
    assert item.table_name == "item_id_table"
    with pytest.raises(ConfigError, match=r"'small'.* it must be at least 11, or the table a DynamicEmbeddingArgs"):
        source("ranking", tables=(small, *others))


def test_a_history_without_candidates_keeps_its_length(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:
    text = tiny_config("ranking", store, tmp_path).operative_gin()
    whole, candidates = "DatasetArgs.max_sequence_length = 8", "DatasetArgs.max_num_candidates = 0"
    assert whole in text and candidates in text
    text = text.replace(whole, "DatasetArgs.max_history_seqlen = 4").replace(candidates, candidates[:-1] + "3")
    (tmp_path / "run.gin").write_text(text)
    source = open_source(load([str(tmp_path / "run.gin")], [], "ranking"), mesh)
    longest = source.train_lengths.items == source.train_lengths.items.max()
    assert set(source.train_lengths.items[longest] - source.train_lengths.candidates[longest]) == {4}
    assert source.max_items == 7


def test_ranking_evaluates_the_validation_users(source: Callable[..., StoreSource]) -> None:
    opened = source("ranking")
    assert (opened.eval_splits, opened.final_splits) == (("valid",), ("valid",))
    trained = {user for _, batch in zip(range(2), opened.train_batches(FIRST), strict=False) for user in real(batch)}
    evaluated = [user for batch in opened.eval_batches("valid") for user in real(batch)]
    assert sorted([*trained, *evaluated]) == list(range(20))


@pytest.mark.parametrize(
    ("valid_items", "while_training", "at_the_end"), [(1, ("valid",), ("valid", "test")), (0, ("test",), ("test",))]
)
def test_retrieval_without_validation_items_evaluates_on_the_last_ones(
    source: Callable[..., StoreSource], valid_items: int, while_training: Any, at_the_end: Any
) -> None:
    opened = source("retrieval", dataset={"valid_items": valid_items})
    assert (opened.eval_splits, opened.final_splits) == (while_training, at_the_end)


def test_seen_items_come_with_evaluation_batches_only_where_they_are_filtered(
    source: Callable[..., StoreSource],
) -> None:
    assert next(source("retrieval").eval_batches("valid")).seen_values is not None
    assert next(source("retrieval", task_args={"filter_seen": False}).eval_batches("valid")).seen_values is None
    assert next(source("retrieval").train_batches(FIRST)).seen_values is None


def test_training_batches_have_what_users_had_before_where_it_is_masked(source: Callable[..., StoreSource]) -> None:
    opened = source("retrieval", task_args={"mask_seen": True}, dataset={"max_sequence_length": 3})
    batch = next(opened.train_batches(FIRST))
    offsets, items = np.asarray(opened.store.offsets()), opened.store.sequence("item_id")
    for row, user in enumerate(real(batch)):
        begin, stop = offsets[user], offsets[user + 1] - 2  # the last two are held out
        seen = batch.seen_values[batch.seen_offsets[row] : batch.seen_offsets[row + 1]]
        assert seen.tolist() == items[begin : max(begin, stop - 3)].tolist()
    assert len(batch.seen_values) > 0


def test_times_are_read_for_relative_bias_only(source: Callable[..., StoreSource]) -> None:
    assert next(source("ranking").train_batches(FIRST)).timestamps is None
    relative = source("ranking", network={"position_encoding": "relative_bias"})
    assert next(relative.train_batches(FIRST)).timestamps is not None
    assert next(relative.eval_batches("valid")).timestamps is not None


def test_a_request_is_made_at_the_time_of_the_held_out_event(source: Callable[..., StoreSource]) -> None:
    network = {"position_encoding": ("absolute", "relative_bias")}
    without = source("retrieval", network=network, dataset={"query_time": "last_event"})
    assert next(without.eval_batches("valid")).request_times is None
    opened = source("retrieval", network=network)
    assert next(opened.train_batches(FIRST)).request_times is None
    batch = next(opened.eval_batches("valid"))
    offsets, times = opened.store.offsets(), opened.store.sequence("timestamp")
    expected = [times[offsets[user + 1] - 2] for user in real(batch)]  # the last event is the test's
    assert batch.request_times is not None and expected
    assert batch.request_times[: batch.real_batch_size].tolist() == expected


def test_batches_go_on_from_any_position(source: Callable[..., StoreSource]) -> None:
    straight = source("retrieval").train_batches(FIRST)
    batches = [next(straight) for _ in range(5)]
    assert [batch.position.consumed for batch in batches[:3]] == [8, 16, 20]
    resumed = source("retrieval").train_batches(batches[1].position)
    for expected in batches[2:]:
        assert ids(next(resumed), "item_id") == ids(expected, "item_id")


def test_histories_of_chosen_users_come_whole_in_the_given_order(source: Callable[..., StoreSource]) -> None:
    opened = source("retrieval", trainer={"eval_batch_size": 2}, task_args={"negatives": "full"})
    users = np.array([7, 0, 7])
    batches = list(opened.history_batches(users))
    assert [user for batch in batches for user in real(batch)] == [7, 0, 7]
    rows = walks()["items"]
    assert ids(batches[0], "item_id") == [*rows[7][-8:], *rows[0][-8:]]
    assert all(ids(batch, NEGATIVES) == [] for batch in batches), "nothing is contrasted, so no corpus is looked up"


@pytest.mark.parametrize("options", [{"data_workers": 1}, {"data_workers": 2, "data_prefetch": 1}])
def test_workers_change_nothing(train: Callable[..., FinishedRun], options: dict[str, int]) -> None:
    one, other = (train("retrieval", trainer={"eval_at_end": True, **more}) for more in ({}, options))
    assert one.losses == other.losses
    assert one.metrics == other.metrics


# --- ids without a row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["in_batch", "uniform", "full"])
def test_a_dynamic_table_smaller_than_the_ids_trains_and_evaluates(
    train: Callable[..., FinishedRun], store: SequenceStore, negatives: str
) -> None:
    options = {"negatives": negatives} | ({"num_negatives": 4} if negatives == "uniform" else {})
    finished = train(
        "retrieval",
        tables=tables_with_dynamic(store, rows=7),
        trainer={"max_train_iters": 30, "eval_at_end": True},
        task_args={**options, "filter_seen": False, "eval_metrics": ("HR@7", "HR@11", "MRR")},
    )
    assert finished.metrics["HR@7"] < 1.0, "a target without a row is a miss"
    assert finished.metrics["HR@11"] == finished.metrics["HR@7"] and finished.metrics["MRR"] > 0.1
    assert finished.losses[-1] < finished.losses[0]
    report = [record for record in finished.records if record["kind"] == "train"][-1]["tables"]["movies"]
    assert report["rows"] == report["capacity"] == 7
    assert report["evictions"] == report["insertions"] > 0 and 0 < report["hit_rate"] < 1


# --- a second store ------------------------------------------------------------------------------------------------


def write_users(path: Path, users: list[int], *, item_order: np.ndarray, extra_context: bool = False) -> SequenceStore:
    """A store of these users of the walks that numbers items by ``item_order`` (code → raw id 1000, 1001, …).

    StoreWriter wants vocabularies in ascending order, so codes are the places of those items that occur.
    """
    data = walks()
    rows = [data["items"][user] for user in users]
    raw = np.unique(np.array([item_order[item] for row in rows for item in row]))
    total = sum(len(row) for row in rows)
    with StoreWriter(path, name="other", command=None) as writer:
        writer.write_offsets(np.cumsum([0, *(len(row) for row in rows)]))
        towns = np.array([data["context"]["town"][user] for user in users])
        if extra_context:
            writer.write_context("planet", np.zeros(len(users), dtype=np.int64), cardinality=1)
        writer.write_context("town", towns, cardinality=3)
        items = np.searchsorted(raw, [item_order[item] for row in rows for item in row])
        writer.create_sequence("item_id", "item", cardinality=len(raw), length=total)[:] = items
        writer.write_vocabulary("item_id", 1000 + raw)
        writer.write_vocabulary("user_id", 100 + np.array(users))
        actions = [action for user in users for action in data["actions"][user]]
        writer.create_sequence("action", "action", cardinality=max(actions) + 1, length=total)[:] = actions
        writer.create_sequence("timestamp", "timestamp", cardinality=None, length=total)[:] = np.arange(total)
    return SequenceStore.open(path)


def test_a_second_store_with_other_numbers_gives_the_metrics_of_one_store(
    mesh: Mesh, make_store: Callable[..., SequenceStore], tmp_path: Path
) -> None:
    data = walks()
    one_more = {"items": [[item + 1 for item in row] for row in data["items"]], "num_items": ITEMS + 1}
    store = make_store(**{**data, **one_more})  # its item 0, raw id 1000, is nobody's
    trainer = build(tiny_config("ranking", store, tmp_path / "out", trainer={"max_train_iters": 10}), mesh)
    trainer.train()
    first = list(trainer.source.eval_batches("valid"))
    held_out = [user for batch in first for user in real(batch)]
    second_store = write_users(tmp_path / "second", held_out, item_order=1 + np.arange(ITEMS), extra_context=True)
    begins = second_store.offsets()[:-1]
    assert (second_store.sequence("item_id")[begins] + 1 == [one_more["items"][user][0] for user in held_out]).all()

    config = tiny_config("ranking", store, tmp_path, dataset={"eval_dataset_path": str(second_store.path)})
    second = list(open_source(config, mesh).eval_batches("valid"))
    assert [ids(batch, "item_id") for batch in second] == [ids(batch, "item_id") for batch in first]
    assert trainer.evaluator.evaluate(second) == trainer.evaluator.evaluate(first)


def test_ids_that_only_the_second_store_has_are_refused(
    source: Callable[..., StoreSource], tmp_path: Path, store: SequenceStore
) -> None:
    shifted = np.arange(ITEMS) + ITEMS - 1
    second = write_users(tmp_path / "second", list(range(20)), item_order=shifted)
    with pytest.raises(DataError) as caught:
        source("ranking", dataset={"eval_dataset_path": str(second.path)})
    for part in (
        "DatasetArgs.eval_dataset_path",
        str(second.path),
        "10 raw id(s)",
        "'item_id': 1011, 1012",
        "or leave",
    ):
        assert part in str(caught.value)


def test_actions_beyond_those_trained_on_are_refused(
    make_store: Callable[..., SequenceStore], source: Callable[..., StoreSource]
) -> None:
    data = walks()
    second = make_store(**{**data, "num_actions": 9})
    with pytest.raises(ConfigError, match=r"eval_dataset_path: 'action' is up to 8 in .* and up to 3 in"):
        source("ranking", dataset={"eval_dataset_path": str(second.path)})


def test_a_second_store_without_a_feature_is_refused(
    make_store: Callable[..., SequenceStore], source: Callable[..., StoreSource]
) -> None:
    second = make_store(**{**walks(), "context": {}})
    with pytest.raises(DataError, match="has no feature 'town'"):
        source("ranking", dataset={"eval_dataset_path": str(second.path)})


# --- random data ---------------------------------------------------------------------------------------------------


def random_config(task: str, output: Path, **task_args: Any) -> RunConfig:
    items, users, actions = "item", "user", "action"
    rows = {items: 20, users: 7, actions: 4}
    return RunConfig(
        task=task,  # type: ignore[arg-type]
        trainer=TrainerArgs(**{**TRAINER, "max_train_iters": 5, "eval_at_end": True, "output_dir": f"{output}/run"}),
        dataset=BenchmarkDatasetArgs(
            feature_args=[
                FeatureArgs(
                    feature_names=[items, actions],
                    max_sequence_length=9,
                    is_jagged=True,
                    value_dists=[RandomDistribution(dist_type="zipf"), RandomDistribution()],
                ),
                FeatureArgs(feature_names=[users], max_sequence_length=1),
            ],
            embedding_args=[
                EmbeddingArgs(
                    feature_names=[name],
                    table_name=name,
                    item_vocab_size_or_capacity=count,
                    sharding_type="data_parallel" if name == actions else "model_parallel",
                )
                for name, count in rows.items()
            ],
            item_feature_name=items,
            contextual_feature_names=[users],
            action_feature_name=actions,
            num_generated_batches=3,
        ),
        network=NetworkArgs(**NETWORK),
        optimizer=OptimizerArgs(optimizer_str="adam", learning_rate=0.01),
        task_args=RankingArgs(prediction_head_arch=[8, 2], num_tasks=2, **task_args)
        if task == "ranking"
        else RetrievalArgs(**task_args),
    )


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("ranking", {"eval_metrics": ("AUC", "GAUC", "NE")}),
        ("retrieval", {}),
        ("retrieval", {"negatives": "uniform", "num_negatives": 4}),
        ("retrieval", {"negatives": "full", "filter_seen": False}),
    ],
)
def test_random_data_trains_and_evaluates(mesh: Mesh, tmp_path: Path, task: str, options: dict[str, Any]) -> None:
    finished = run(random_config(task, tmp_path, **options), mesh)
    assert len(finished.losses) == 5 and finished.evaluations == [(5, "valid")]
    assert finished.records[-1]["epoch"] == pytest.approx(5 / 3)
    assert all(value is not None and np.isfinite(value) for value in finished.metrics.values())


def test_random_batches_repeat_after_as_many_as_were_asked_for(mesh: Mesh, tmp_path: Path) -> None:
    opened = open_source(random_config("retrieval", tmp_path), mesh)
    assert isinstance(opened, RandomSource) and opened.batches_per_epoch == 3
    batches = opened.train_batches(FIRST)
    seen = [ids(next(batches), "item") for _ in range(6)]
    assert seen[:3] == seen[3:] and seen[0] != seen[1] != seen[2]
    evaluated = [ids(batch, "item") for batch in opened.eval_batches("valid")]
    assert len(evaluated) == 3 and evaluated[0] != seen[0]


def test_random_data_for_a_head_without_a_class_for_action_0_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    source = open_source(random_config("ranking", tmp_path), mesh)
    with pytest.raises(ConfigError, match="'action' also takes the value 0: end it in 4"):
        label_offset(RankingArgs(prediction_head_arch=[8, 3]), source)


def real(batch: HSTUBatch) -> list[int]:
    """Rows of the users in a batch, without padding."""
    users: list[int] = batch.user_ids[batch.user_ids >= 0].tolist()
    return users
