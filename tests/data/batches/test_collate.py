from typing import Any

import numpy as np
import pytest
import torch

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import DatasetArgs
from hstu.data.batches.batch import NEGATIVES, HSTUBatch, packed, unpacked
from hstu.data.batches.collate import Assembler, Collator, SkippedSamples
from hstu.data.batches.loader import build_loader
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import BatchPlan, EvalSampler, TrainSampler
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import StoreReader
from tests.base.test_hashing import chi_square_z
from tests.data.collators import assert_same, batches_of, collator_of, host, num_samples
from tests.data.toy_store import ToyStore, store_of
from tests.helpers import make_batch


def test_a_retrieval_batch_predicts_each_next_item() -> None:
    store = ToyStore([[7, 8, 9, 1, 2], [5, 5, 3, 4], [1, 2]], actions=[[1, 2, 3, 4, 5], [6, 7, 8, 9], [1, 1]])
    (batch,) = batches_of(collator_of(store, length=2, negatives=Negatives("in_batch")))
    expected = make_batch([[8, 9], [5, 5], [], []], [[2, 3], [6, 7], [], []], task="retrieval", in_batch_pool=True)
    assert_same(batch, expected)
    assert batch.labels.tolist() == [9, 5]
    assert batch.features["item"].values()[batch.negatives.pool_positions].tolist() == [5, 8, 9]
    assert host(batch.negatives.pool_positions).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, [([8, 9, 1], [7, 6]), ([5, 3], [])]),
        ({"window_stride": 1}, [([8, 9, 1], [7, 6]), ([6, 8, 9], [7]), ([7, 6, 8], []), ([5, 3], [])]),
    ],
    ids=["newest", "windows"],
)
def test_a_training_batch_has_the_items_before_its_sequences_where_seen_items_are_masked(
    args: dict[str, Any], expected: list[tuple[list[int], list[int]]]
) -> None:
    store = ToyStore([[7, 6, 8, 9, 1, 2], [5, 3, 4]])
    options: dict[str, Any] = {"length": 3, "args": {"valid_items": 0, **args}}
    (batch,) = batches_of(collator_of(store, wants_seen=True, **options))
    padding: list[tuple[list[int], list[int]]] = [([], [])] * (4 - len(expected))
    sequences, earlier = zip(*expected, *padding, strict=True)
    assert [row.tolist() for row in batch.features["item"].to_dense()] == [*sequences]
    assert batch.seen is not None
    assert [row.tolist() for row in batch.seen.values.split(batch.seen.lengths.tolist())] == [*earlier]
    assert batches_of(collator_of(store, **options))[0].seen is None


def test_an_empty_plan_gives_an_empty_batch_of_full_size() -> None:
    collator = collator_of(
        ToyStore([[1, 2, 3, 4]], context={"age": [3]}), negatives=Negatives("uniform", 3), batch_size=2
    )
    plans = [next(iter(EvalSampler(1, 2, rank, world_size=2))) for rank in range(2)]
    (empty,) = [collator(plan) for plan in plans if not len(plan.indices)]
    assert empty.batch_size == 2 and empty.real_batch_size == empty.item_lengths.sum() == empty.num_labels_total == 0
    assert empty.features.values().tolist() == [] and host(empty.negatives.draws).shape == (0, 3)


@pytest.mark.parametrize(
    "negatives",
    [Negatives("in_batch"), Negatives("in_batch", 2), Negatives("uniform", 3), Negatives("mixed", 3, shared=True)],
)
def test_ranks_with_and_without_samples_read_the_batches_of_each_other(negatives: Negatives) -> None:
    store = ToyStore([[1, 2, 3, 4], [5, 6, 5, 7]], times=[[1, 2, 3, 4], [1, 2, 3, 4]], context={"age": [3, 4]})
    collator = collator_of(store, length=3, negatives=negatives, wants_timestamps=True, wants_seen=True)
    batches = [collator(BatchPlan.of(np.arange(number))) for number in range(3)]
    for own in batches:
        for other in batches:
            assert_same(unpacked(own, *packed(other)), other)


def test_what_the_data_lacks_is_a_configuration_error() -> None:
    store = ToyStore([[1, 2, 3]])
    with pytest.raises(ConfigError, match="ranking needs an action feature"):
        collator_of(store, "ranking", "all")
    with pytest.raises(ConfigError, match="needs times"):
        collator_of(store, wants_timestamps=True)


# Negatives


def long_store(num_items: int = 60) -> ToyStore:
    random = np.random.default_rng(0)
    return ToyStore([random.integers(0, num_items, 30).tolist() for _ in range(40)], num_items=num_items)


def drawn_items(batch: HSTUBatch) -> np.ndarray:
    return batch.features[NEGATIVES].values().numpy()[host(batch.negatives.draws)]


@pytest.mark.parametrize("num_items", [60, 5_000, 10_000_000], ids=["whole corpus", "dense", "sorted"])
def test_uniform_draws_are_uniform_and_independent_of_the_position(num_items: int) -> None:
    store = long_store()
    store.features = {
        name: meta.__class__(**{**vars(meta), "cardinality": num_items}) for name, meta in store.features.items()
    }
    (batch,) = batches_of(collator_of(store, batch_size=40, negatives=Negatives("uniform", 64)))
    looked_up = batch.features[NEGATIVES].values().numpy()
    assert len(np.unique(looked_up)) == len(looked_up)
    assert (num_items == 60) == (len(looked_up) == 60)
    items = drawn_items(batch)
    assert host(batch.negatives.draws).dtype == np.int32 and items.shape == (batch.num_labels_total, 64)
    cells = items * 60 // num_items
    assert abs(chi_square_z(np.bincount(cells.ravel(), minlength=60))) < 4
    neighbours = cells[:, :-1] * 60 + cells[:, 1:]
    assert abs(chi_square_z(np.bincount(neighbours.ravel(), minlength=3600))) < 4
    below = cells[:-1] * 60 + cells[1:]
    assert abs(chi_square_z(np.bincount(below.ravel(), minlength=3600))) < 4


def draws_by_user(collator: Collator, world_size: int, batch_size: int, seed: int = 0) -> dict[tuple[int, int], bytes]:
    """(epoch, user) -> what its positions were given, over two epochs."""
    found = {}
    for rank in range(world_size):
        for plan in TrainSampler(num_samples(collator), batch_size, rank, world_size, seed=seed, shuffle=True):
            if plan.epoch == 2:
                break
            batch = collator(plan)
            values = drawn_items(batch) if NEGATIVES in batch.features.keys() else host(batch.negatives.draws)  # noqa: SIM118
            per_sample = np.split(values, np.cumsum(batch.num_labels.numpy())[:-1])
            for user, draws in zip(batch.user_ids.tolist(), per_sample, strict=True):
                if user >= 0:
                    found[plan.epoch, user] = draws.tobytes()
    return found


@pytest.mark.parametrize("negatives", [Negatives("uniform", 5), Negatives("in_batch", 5)], ids=lambda n: n.kind)
def test_a_samples_draws_do_not_depend_on_the_world_size(negatives: Negatives) -> None:
    collator = collator_of(long_store(3000), negatives=negatives, batch_size=8)
    alone = draws_by_user(collator, world_size=1, batch_size=8)
    assert len(alone) == 80
    assert draws_by_user(collator, world_size=3, batch_size=5) == alone
    assert len(set(alone.values())) == 80, "every sample and epoch has its own"


def test_in_batch_draws_are_31_random_bits() -> None:
    (batch,) = batches_of(collator_of(long_store(), batch_size=40, negatives=Negatives("in_batch", 33)))
    draws = host(batch.negatives.draws)
    assert draws.dtype == np.int32 and draws.min() >= 0 and NEGATIVES not in batch.features.keys()  # noqa: SIM118
    assert abs(chi_square_z(np.bincount((draws >> 25).ravel(), minlength=64))) < 4
    assert abs(chi_square_z(np.bincount((draws & 63).ravel(), minlength=64))) < 4


def test_shared_negatives_are_the_same_on_all_ranks_and_new_for_each_batch() -> None:
    collator = collator_of(long_store(), negatives=Negatives("uniform", 2000, shared=True), batch_size=5)
    ranks = [batches_of(collator, world_size=2, rank=rank) for rank in range(2)]
    shared = [[batch.features[NEGATIVES].values() for batch in batches] for batches in ranks]
    assert all(torch.equal(one, other) for one, other in zip(*shared, strict=True))
    assert not torch.equal(shared[0][0], shared[0][1])
    assert shared[0][0].shape == (2000,) and ranks[0][0].negatives.draws is None
    assert abs(chi_square_z(np.bincount(torch.cat(shared[0]).numpy(), minlength=60))) < 4


def test_mixed_negatives_are_the_items_of_the_batch_and_draws_that_all_ranks_share() -> None:
    collator = collator_of(long_store(), negatives=Negatives("mixed", 50, shared=True), batch_size=5)
    ranks = [batches_of(collator, world_size=2, rank=rank)[0] for rank in range(2)]
    assert torch.equal(*(batch.features[NEGATIVES].values() for batch in ranks))
    for batch in ranks:
        items = batch.features["item"].values()
        assert batch.negatives.draws is None and batch.features[NEGATIVES].values().shape == (50,)
        assert items[batch.negatives.pool_positions].tolist() == sorted(set(items.tolist()))


def test_full_negatives_are_the_corpus() -> None:
    batch = batches_of(collator_of(long_store(), negatives=Negatives("full")))[0]
    assert batch.features[NEGATIVES].values().tolist() == list(range(60)) and batch.negatives.draws is None
    assert batch.features[NEGATIVES].lengths().tolist() == [60, 0, 0, 0]


@pytest.mark.parametrize("kind", ["in_batch", "uniform", "mixed", "full"])
def test_an_evaluation_has_the_keys_of_training_but_no_negatives(kind: str) -> None:
    negatives = Negatives(kind, 3)  # type: ignore[arg-type]
    train, test = (
        batches_of(collator_of(long_store(), split=split, negatives=negatives))[0] for split in ("train", "test")
    )
    assert test.features.keys() == train.features.keys()
    assert test.features.length_per_key()[1:] == [0] * (kind != "in_batch")
    assert test.negatives.draws is None and test.negatives.pool_positions is None


# Damaged samples


def damaged_loader(
    limit: int, workers: int = 0, damaged: tuple[int, ...] = (6, 20)
) -> tuple[SkippedSamples, list[list[int]]]:
    store = store_of(4, 5, 6, 7, 8)
    store.arrays["item"][list(damaged)] = 77  # users 1 and 3; 50 items
    samples = build_samples(store, DatasetArgs(dataset_name="toy", max_sequence_length=9), "retrieval", "test", 1)
    roles, skipped = FeatureRoles("item", None, ()), SkippedSamples(limit)
    collator = Collator(StoreReader(store, samples, roles).read, Assembler(2, "retrieval", roles, 50, 1), skipped)
    loader = build_loader(collator, EvalSampler(len(samples), 2, 0, 1), workers=workers)
    return skipped, [batch.user_ids.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_left_out_and_counted_over_workers(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    skipped, users = damaged_loader(limit=2, workers=workers)
    assert users == [[0, -1], [2, -1], [4, -1]]
    assert skipped.count == 2
    if not workers:
        assert "skipped damaged sample 1 of at most 2: toy: item = 77 is not in" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damaged_samples_than_allowed_end_the_run(workers: int) -> None:
    said = r"^toy: item = 77 is not .* damaged sample 2, and a rank may skip 1"
    with pytest.raises(DataError, match=said) as error:
        damaged_loader(limit=1, workers=workers)
    assert "Traceback" not in str(error.value)
