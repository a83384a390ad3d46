"""Windows and damaged samples, from the options to a training run."""

from itertools import islice
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import DataError
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.sources import StoreSource
from tests.conftest import MakeStore
from tests.train.conftest import OpenSource

LONGEST = 5


@pytest.fixture
def source(source: OpenSource) -> OpenSource:
    """``source("retrieval", dataset={...})`` over the walks, histories of at most 5."""

    def open_it(task: str, **options: Any) -> StoreSource:
        dataset = {"max_sequence_length": LONGEST} | options.pop("dataset", {})
        return source(task, dataset=dataset, **options)

    return open_it


def lengths(source: StoreSource, epochs: int = 1) -> list[int]:
    batches = islice(source.train_batches(SamplerPosition()), epochs * source.batches_per_epoch)
    return [length for batch in batches for length in batch.item_lengths[: batch.real_batch_size].tolist()]


@pytest.mark.parametrize("windows", [{"window_stride": 4}, {"window_stride": "random"}])
def test_evaluation_knows_nothing_of_windows(source: OpenSource, windows: dict[str, Any]) -> None:
    for task in ("retrieval", "ranking"):
        plain, changed = source(task), source(task, dataset=windows)
        pairs = zip(plain.eval_batches("valid"), changed.eval_batches("valid"), strict=True)
        assert all((one.features.values() == other.features.values()).all() for one, other in pairs)


def test_random_windows_have_other_items_in_each_epoch_and_as_many_labels(source: OpenSource) -> None:
    for task in ("retrieval", "ranking"):
        negatives = {"negatives": "uniform", "num_negatives": 4} if task == "retrieval" else {}
        newest, windows = (
            source(task, dataset={"window_stride": "random" if is_random else None}, task_args=negatives)
            for is_random in (False, True)
        )
        epochs = [
            [list(islice(each.train_batches(SamplerPosition(epoch, 0)), each.batches_per_epoch)) for epoch in (0, 1)]
            for each in (newest, windows)
        ]
        (plain, _), (one, other) = epochs
        assert [batch.num_labels_total for batch in one] == [batch.num_labels_total for batch in plain]
        seen = [
            {tuple(batch.features["item_id"].values().tolist()) for batch in epoch} for epoch in (plain, one, other)
        ]
        assert len(set.union(*seen)) == sum(map(len, seen))
        if task == "retrieval":
            assert windows.item_counts.sum() == pytest.approx(newest.item_counts.sum())


def test_a_damaged_sample_ends_the_run_or_is_left_out(
    make_store: MakeStore, source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = make_store([[0, 1, 2, 3, 4, 5]] * 6, actions=[[1, 0, 1, 0, 1, 1]] * 6, num_items=11, num_actions=4)
    monkeypatch.setattr("hstu.data.store.sequence_store._HASHED_ON_OPENING", 0)  # as in a large store
    file = damaged.path / "sequence.item_id.npy"
    values = np.lib.format.open_memmap(file, mode="r+")
    values[14] = 99
    values.flush()
    damaged = SequenceStore.open(damaged.path)
    with pytest.raises(DataError, match="item_id = 99 is not in"):
        lengths(source("retrieval", store=damaged))
    skipping = source("retrieval", store=damaged, trainer={"bad_row_policy": "skip"})
    assert len(lengths(skipping)) == 5
    assert skipping._skipped is not None
    skipping._skipped.limit = 2
    with pytest.raises(DataError, match=r"damaged sample 3, and a rank may skip 2"):
        lengths(skipping, epochs=4)
