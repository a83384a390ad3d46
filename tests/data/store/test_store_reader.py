"""What is read of a store, and what of it is refused."""

import pytest

from hstu.base.errors import DataError
from hstu.config.args import Task
from hstu.data.sampling.splits import Split
from tests.conftest import MakeStore
from tests.data.collators import assert_same, batches_of, collator_of
from tests.data.toy_store import ToyStore


def test_a_store_on_disk_and_one_in_memory_give_the_same_batches(make_store: MakeStore) -> None:
    items, actions, context = [[1, 2, 3], [4, 5, 6, 7], [8, 9]], [[1, 2, 3], [4, 5, 6, 7], [8, 9]], {"age": [2, 1, 0]}
    on_disk = make_store(items, actions=actions, context=context, item_feature="item", num_items=50)
    in_memory = ToyStore(items, actions=actions, context=context)
    cases: list[tuple[Task, Split]] = [("ranking", "all"), ("retrieval", "train"), ("retrieval", "test")]
    for task, split in cases:
        pairs = [batches_of(collator_of(store, task, split, batch_size=3)) for store in (on_disk, in_memory)]
        for one, other in zip(*pairs, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(
    ("feature", "position", "value", "message"),
    [
        ("item", 4, 50, "item = 50 is not in [0, 50)"),
        ("item", 1, -1, "item = -1 is not in"),
        ("action", 5, 10, "action = 10 is not in"),
        ("age", 1, 77, "age = 77 is not in"),
    ],
)
def test_a_value_out_of_range_is_refused(feature: str, position: int, value: int, message: str) -> None:
    store = ToyStore([[1, 2, 3], [4, 5, 6]], actions=[[1, 2, 3], [4, 5, 6]], context={"age": [1, 2]})
    collator = collator_of(store, "ranking", "all")
    assert len(batches_of(collator)) == 1
    store.arrays[feature][position] = value
    with pytest.raises(DataError) as error:
        batches_of(collator)
    assert message in str(error.value) and "preprocess it again" in str(error.value)
