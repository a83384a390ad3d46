"""Batches from a preprocessed store, and from a second one for evaluation, which numbers its ids differently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import EmbeddingArgs
from hstu.config.gin_io import load
from hstu.data.batches.batch import NEGATIVES
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.sampling.sampler import START, SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.evaluate import RetrievalEvaluator
from hstu.train.sources import open_source
from tests.conftest import MakeStore, write_small_store
from tests.train.conftest import OpenSource
from tests.train.tiny import ITEMS, build, ids, real_users, run, tables_of, tiny_config, walks

FIRST = SamplerPosition()


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


def test_a_built_in_dataset_has_tables_of_which_some_can_be_given_by_hand(source: OpenSource) -> None:
    mine = EmbeddingArgs(
        feature_names=["item_id"],
        table_name="mine",
        item_vocab_size_or_capacity=50,
        sharding_type="data_parallel",
        init_std=0.5,
    )
    tables = source("ranking", tables=(mine,), dataset={"dataset_name": "ml-100k"}).tables
    rows = {table.table_name: table.item_vocab_size_or_capacity for table in tables}
    assert rows == {"mine": 50, "town": 3, "action": 4}


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


def test_ranking_evaluates_the_validation_users(source: OpenSource) -> None:
    opened = source("ranking")
    assert (opened.eval_splits, opened.final_splits) == (("valid",), ("valid",))
    trained = {
        user for _, batch in zip(range(2), opened.train_batches(FIRST), strict=False) for user in real_users(batch)
    }
    evaluated = [user for batch in opened.eval_batches("valid") for user in real_users(batch)]
    assert sorted([*trained, *evaluated]) == list(range(20))


@pytest.mark.parametrize(
    ("valid_items", "while_training", "at_the_end"), [(1, ("valid",), ("valid", "test")), (0, ("test",), ("test",))]
)
def test_retrieval_without_validation_items_evaluates_on_the_last_ones(
    source: OpenSource, valid_items: int, while_training: Any, at_the_end: Any
) -> None:
    opened = source("retrieval", dataset={"valid_items": valid_items})
    assert (opened.eval_splits, opened.final_splits) == (while_training, at_the_end)


def test_seen_items_come_where_they_are_filtered_or_masked(source: OpenSource) -> None:
    assert next(source("retrieval").eval_batches("valid")).seen is not None
    assert next(source("retrieval", task_args={"filter_seen": False}).eval_batches("valid")).seen is None
    assert next(source("retrieval").train_batches(FIRST)).seen is None
    assert next(source("retrieval", task_args={"mask_seen": True}).train_batches(FIRST)).seen is not None


def test_a_request_is_made_at_the_time_of_the_held_out_event(source: OpenSource) -> None:
    network = {"position_encoding": ("absolute", "relative_bias")}
    without = source("retrieval", network=network, dataset={"query_time": "last_event"})
    assert next(without.eval_batches("valid")).request_times is None
    opened = source("retrieval", network=network)
    assert next(opened.train_batches(FIRST)).request_times is None
    batch = next(opened.eval_batches("valid"))
    offsets, times = opened.store.offsets(), opened.store.sequence("timestamp")
    expected = [times[offsets[user + 1] - 2] for user in real_users(batch)]  # the last event is the test's
    assert batch.request_times is not None and expected
    assert batch.request_times[: batch.real_batch_size].tolist() == expected


def test_half_of_the_sequences_trains_with_the_time_of_the_request_whatever_their_batches(source: OpenSource) -> None:
    def drawn(batch_size: int) -> dict[tuple[int, int], bool]:
        """(epoch, user) → whether the sequence trains with the time, for 20 epochs."""
        options: dict[str, Any] = {
            "network": {"position_encoding": "relative_bias"},
            "dataset": {"query_time": "either"},
        }
        opened = source("retrieval", **options, trainer={"train_batch_size": batch_size})
        assert next(opened.eval_batches("valid")).asks_for_next is None
        found: dict[tuple[int, int], bool] = {}
        for batch in opened.train_batches(FIRST):
            assert batch.position is not None and batch.asks_for_next is not None
            if batch.position.epoch == 20:
                break
            asks = batch.asks_for_next.tolist()
            found |= {(batch.position.epoch, user): asks[row] for row, user in enumerate(real_users(batch))}
        return found

    draws = drawn(batch_size=8)
    assert draws == drawn(batch_size=5)
    assert 0.4 < np.mean([*draws.values()]) < 0.6 and len({draws[epoch, 0] for epoch in range(20)}) == 2


def test_histories_of_chosen_users_come_whole_in_the_given_order(source: OpenSource) -> None:
    opened = source("retrieval", trainer={"eval_batch_size": 2}, task_args={"negatives": "full"})
    users = np.array([7, 0, 7])
    batches = list(opened.history_batches(users))
    assert [user for batch in batches for user in real_users(batch)] == [7, 0, 7]
    rows = walks()["items"]
    assert ids(batches[0], "item_id") == [*rows[7][-8:], *rows[0][-8:]]
    assert all(ids(batch, NEGATIVES) == [] for batch in batches), "nothing is contrasted, so no corpus is looked up"


def test_a_source_keeps_24_bytes_per_sample(source: OpenSource) -> None:
    opened = source("ranking")
    samples = opened._train_samples
    arrays = {
        id(value): value for value in [*vars(samples).values(), *opened.train_lengths] if hasattr(value, "nbytes")
    }
    assert sum(array.nbytes for array in arrays.values()) == 24 * len(samples)


def write_users(path: Path, users: list[int], *, item_order: np.ndarray, context: tuple[str, ...]) -> SequenceStore:
    """A store of these users of the walks that numbers items by ``item_order`` (code → raw id 1000, 1001, …).

    Vocabularies ascend, so codes are the places of those items that occur.
    """
    data = walks()
    rows = [item_order[data["items"][user]] for user in users]
    raw = np.unique(np.concatenate(rows))
    towns = [data["context"]["town"][user] for user in users]
    return write_small_store(
        path,
        [np.searchsorted(raw, row).tolist() for row in rows],
        actions=[data["actions"][user] for user in users],
        context={"town": towns} | dict.fromkeys(context, [0] * len(users)),
        item_ids=(1000 + raw).tolist(),
    )


def test_a_second_store_with_other_numbers_gives_the_metrics_of_one_store(
    mesh: Mesh, make_store: MakeStore, tmp_path: Path
) -> None:
    data = walks()
    one_more: dict[str, Any] = {"items": [[item + 1 for item in row] for row in data["items"]], "num_items": ITEMS + 1}
    store = make_store(**{**data, **one_more})  # its item 0, raw id 1000, is nobody's
    trainer = build(tiny_config("ranking", store, tmp_path / "out", trainer={"max_train_iters": 10}), mesh)
    trainer.train()
    first = list(trainer.source.eval_batches("valid"))
    held_out = [user for batch in first for user in real_users(batch)]
    second_store = write_users(tmp_path / "second", held_out, item_order=1 + np.arange(ITEMS), context=("planet",))
    begins = second_store.offsets()[:-1]
    assert (second_store.sequence("item_id")[begins] + 1 == [one_more["items"][user][0] for user in held_out]).all()

    config = tiny_config("ranking", store, tmp_path, dataset={"eval_dataset_path": str(second_store.path)})
    second = list(open_source(config, mesh).eval_batches("valid"))
    assert [ids(batch, "item_id") for batch in second] == [ids(batch, "item_id") for batch in first]
    assert trainer.evaluator.evaluate(second) == trainer.evaluator.evaluate(first)


def test_ids_that_only_the_second_store_has_are_refused(
    source: OpenSource, tmp_path: Path, store: SequenceStore
) -> None:
    shifted = np.arange(ITEMS) + ITEMS - 1
    second = write_users(tmp_path / "second", list(range(20)), item_order=shifted, context=())
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


def test_actions_beyond_those_trained_on_are_refused(make_store: MakeStore, source: OpenSource) -> None:
    data = walks()
    second = make_store(**{**data, "num_actions": 9})
    with pytest.raises(ConfigError, match=r"eval_dataset_path: .* has 'action' up to 8, the training data below 4"):
        source("ranking", dataset={"eval_dataset_path": str(second.path)})


UNSEEN = 5


def store_with_unseen_items(folder: Path) -> SequenceStore:
    """The walks over the items 0, 2, 4, …; the items 1, 3, … have no events."""
    events = [f"{user},{2 * item}" for user, items in enumerate(walks()["items"]) for item in items]
    (folder / "events.csv").write_text("\n".join(["who,what", *events]))
    names = [f"{item},film {item}" for item in range(2 * UNSEEN)]
    (folder / "items.csv").write_text("\n".join(["what,name", *names]))
    columns = InteractionColumns(
        interactions=folder / "events.csv", user="who", item="what", titles=folder / "items.csv", title="name"
    )
    return SequenceStore.open(import_interactions("walks", columns, output=folder / "store", all_items=True))


def test_items_without_events_are_ranked_and_drawn_as_negatives(mesh: Mesh, tmp_path: Path) -> None:
    store = store_with_unseen_items(tmp_path)
    unseen = np.setdiff1d(np.arange(ITEMS + UNSEEN), store.sequence("what"))
    assert len(unseen) == UNSEEN and (store.raw_ids("what")[unseen] % 2 == 1).all()
    uniform = {"negatives": "uniform", "num_negatives": 16}
    config = tiny_config("retrieval", store, tmp_path, tables=tables_of(store, ("what",)), task_args=uniform)
    source = open_source(config, mesh)
    drawn = next(source.train_batches(START)).features[NEGATIVES].values().numpy()
    assert set(unseen) <= set(drawn)
    finished = run(config, mesh)
    evaluator = finished.trainer.evaluator
    assert isinstance(evaluator, RetrievalEvaluator)
    assert len(finished.losses) == 4 and evaluator.corpus().size == ITEMS + UNSEEN
