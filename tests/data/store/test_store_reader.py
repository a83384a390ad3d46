"""What is read of a store, and what of it is refused."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import DataError
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import write_small_store
from tests.data.collators import assert_same, batches_of, collator_of
from tests.data.toy_store import ToyStore


def test_a_store_on_disk_and_one_in_memory_give_the_same_batches(make_store: Callable[..., SequenceStore]) -> None:
    items, actions, context = [[1, 2, 3], [4, 5, 6, 7], [8, 9]], [[1, 2, 3], [4, 5, 6, 7], [8, 9]], {"age": [2, 1, 0]}
    on_disk = make_store(items, actions=actions, context=context, item_feature="item", num_items=50)
    in_memory = ToyStore(items, actions=actions, context=context)
    for task, split in (("ranking", "all"), ("retrieval", "train"), ("retrieval", "test")):
        pairs = [batches_of(collator_of(store, task, split, batch_size=3)) for store in (on_disk, in_memory)]
        for one, other in zip(*pairs, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(
    ("feature", "position", "value", "message"),
    [
        ("item", 4, 50, "item = 50 of user 101 (event 4) is not in [0, 50)"),
        ("item", 1, -1, "item = -1 of user 100"),
        ("action", 5, 10, "action = 10 of user 101"),
        ("age", 1, 77, "age = 77 of user 101"),
    ],
)
def test_a_value_out_of_range_names_the_user(feature: str, position: int, value: int, message: str) -> None:
    store = ToyStore([[1, 2, 3], [4, 5, 6]], actions=[[1, 2, 3], [4, 5, 6]], context={"age": [1, 2]})
    collator = collator_of(store, "ranking", "all")
    assert len(batches_of(collator)) == 1
    store.arrays[feature][position] = value
    with pytest.raises(DataError) as error:
        batches_of(collator)
    assert message in str(error.value) and "preprocess it again" in str(error.value)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_side_features_are_those_of_each_event_and_of_its_item(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [rng.integers(0, 5, length).tolist() for length in lengths]
    devices = [rng.integers(0, 3, length).tolist() for length in lengths]
    genres = [rng.integers(0, 4, rng.integers(1, 4)).tolist() for _ in range(5)]
    years = rng.integers(0, 3, 5).tolist()
    with tempfile.TemporaryDirectory() as folder:
        store = write_small_store(
            Path(folder) / "store",
            items,
            item_features={"genres": genres, "year": years},
            event_features={"device": devices},
            num_items=5,
        )
        args = {"side_feature_names": ["year", "device", "genres"], "contextual_feature_names": []}
        batches = batches_of(collator_of(store, "retrieval", length=4, batch_size=2, args=args))
        for batch in batches:
            features = batch.features.to_dict()
            users = batch.user_ids[: batch.real_batch_size].tolist()
            newest = {user: slice(max(0, len(items[user]) - 2 - 4), len(items[user]) - 2) for user in users}
            chosen = {user: items[user][newest[user]] for user in users}
            padding = [[]] * (batch.batch_size - batch.real_batch_size)
            expected = {
                "year": [*([[years[item] for item in chosen[user]] for user in users]), *padding],
                "device": [*([devices[user][newest[user]] for user in users]), *padding],
                "genres": [*([[g for item in chosen[user] for g in genres[item]] for user in users]), *padding],
            }
            for name, rows in expected.items():
                assert [part.tolist() for part in features[name].to_dense()] == rows, name
            counts = [len(genres[item]) for user in users for item in chosen[user]]
            assert batch.items.list_lengths is not None and batch.items.list_lengths.tolist() == [counts]
