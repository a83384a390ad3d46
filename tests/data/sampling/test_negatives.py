"""Draws from the corpus by popularity, and how often an item is expected among the negatives.

Hard negatives: what a user was shown and did not take, as negatives of the events after it.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu.base.hashing import random_bits
from hstu.config.args import DatasetArgs
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling import negatives as module
from hstu.data.sampling.negatives import ItemDistribution, Negatives, count_items, expected_log_counts, shown_not_taken
from hstu.data.sampling.sampler import START, BatchPlan
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import write_small_store

DRAWS = 200_000


def draw(corpus: ItemDistribution, seed: int = 3) -> np.ndarray:
    return corpus.items((random_bits(seed, np.arange(DRAWS)) >> np.uint64(32)).astype(np.uint32))


def mass_of_columns(corpus: ItemDistribution) -> np.ndarray:
    """The probability of each code as the alias table has it."""
    assert corpus._columns is not None
    kept, other = corpus._columns
    share = np.where(other == np.arange(corpus.size), 1.0, kept / 2.0**32)
    return (share + np.bincount(other, 1 - share, minlength=corpus.size)) / corpus.size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 1.0, 1.0, 3.5, 7.0, 1e4]) | st.floats(0, 100), min_size=1, max_size=60))
def test_the_alias_table_has_the_probabilities_of_the_weights(weights: list[float]) -> None:
    if sum(weights) <= 0:
        return
    corpus = ItemDistribution(len(weights), np.array(weights))
    np.testing.assert_allclose(corpus.probabilities(), np.array(weights) / sum(weights), rtol=1e-12)
    np.testing.assert_allclose(mass_of_columns(corpus), corpus.probabilities(), rtol=0, atol=2.0**-31)


def test_draws_by_popularity_follow_the_counts_and_leave_out_what_never_occurs() -> None:
    counts = np.array([900, 1, 0, 30, 2, 0, 400, 5, 60, 700])
    corpus = ItemDistribution(10, counts**0.75)
    found = np.bincount(draw(corpus), minlength=10)
    drawn = counts > 0
    expected = DRAWS * corpus.probabilities()[drawn]
    assert not found[~drawn].any()
    chi_square = ((found[drawn] - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # exceeded with probability 0.001 at 7 degrees of freedom


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    stride=st.sampled_from([None, 3]),
    block=st.sampled_from([1, 7, 1 << 24]),
)
def test_items_are_counted_once_for_each_training_sample_that_has_them(
    lengths: list[int], stride: int | None, block: int
) -> None:
    rng = np.random.default_rng(0)
    args = DatasetArgs(dataset_name="toy", max_sequence_length=8, window_stride=stride)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_EVENTS_PER_BLOCK", block)
        items = [rng.integers(0, 9, length).tolist() for length in lengths]
        store = write_small_store(Path(folder) / "store", items, num_items=9)
        samples = build_samples(store, args, "retrieval", "train", 0)
        codes, expected = store.sequence("item_id"), np.zeros(9, dtype=np.int64)
        for start, stop in zip(samples.start, samples.stop, strict=True):
            np.add.at(expected, codes[start:stop], 1)
        assert count_items(store, "item_id", samples).tolist() == expected.tolist()
        assert expected.sum() == samples.report["events"]


def test_expected_counts_of_each_kind() -> None:
    counts, batches = np.array([0, 1, 8]), 4
    in_batch = 1 - 0.75 ** np.array([1, 1, 8])  # what is in a batch occurs
    by_count = np.array([0, 1, 8]) ** 0.75 / (1 + 8**0.75)
    popular = ItemDistribution(3, counts**0.75)

    def expected(negatives: Negatives, corpus: ItemDistribution) -> list[float]:
        return np.exp(expected_log_counts(negatives, corpus, counts, batches)).tolist()

    uniform = ItemDistribution(3)
    assert expected(Negatives("in_batch"), uniform) == pytest.approx(in_batch)
    assert expected(Negatives("in_batch", 5), uniform) == pytest.approx(5 * in_batch)
    assert expected(Negatives("uniform", 6), uniform) == pytest.approx([2, 2, 2])
    assert expected(Negatives("popularity", 6, exponent=0.75), popular)[1:] == pytest.approx(6 * by_count[1:])
    assert expected(Negatives("mixed", 6, shared=True), uniform) == pytest.approx(in_batch + 2)
    assert expected(Negatives("in_batch"), uniform)[2] < 1
    one_batch = np.exp(expected_log_counts(Negatives("in_batch"), uniform, counts, 1))
    assert one_batch.tolist() == [1, 1, 1]


ITEMS = 9
events_of_users = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=6), min_size=1, max_size=4)
Shown = list[tuple[int, int, list[int]]]
"""User, number of the event that follows the request, and what it shows."""


def store_of(path: Path, items: list[list[int]], shown: Shown) -> SequenceStore:
    times = [[10 * place for place in range(1, len(events) + 1)] for events in items]
    requests = [
        (user, 10 * after - 5 + 10, {"item_id": codes, "action": [0] * len(codes)}) for user, after, codes in shown
    ]
    return write_small_store(path, items, actions=items, timestamps=times, requests=requests, num_items=ITEMS)


def plainly(items: list[list[int]], shown: Shown, user: int, place: int, stop: int, num: int) -> list[int]:
    """Those of the event at ``place`` of a user, whose events from ``stop`` on are not known."""
    requests = [(after, codes) for owner, after, codes in shown if owner == user]
    before = [number for number, (after, _) in enumerate(requests) if after <= place]
    found: list[int] = []
    if before and before[-1] + 1 < len(requests) and requests[before[-1] + 1][0] <= stop:
        after, codes = requests[before[-1]]
        taken = items[user][after : requests[before[-1] + 1][0]]
        found = [code for code in codes if code not in taken][:num]
    return found + [-1] * (num - len(found))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), items=events_of_users, num=st.integers(1, 3))
def test_they_are_those_of_a_plain_reference(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, items: list[list[int]], num: int
) -> None:
    places = [(user, after) for user, events in enumerate(items) for after in range(1, len(events) + 1)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=8))
    codes = st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=4)
    shown = [(user, after, data.draw(codes)) for user, after in sorted(chosen)]
    store = store_of(tmp_path_factory.mktemp("log") / "store", items, shown)
    stops = [data.draw(st.integers(1, len(events))) for events in items]
    wanted = [(user, place) for user, stop in enumerate(stops) for place in range(stop)]
    offsets = store.offsets()
    found = shown_not_taken(
        store,
        np.array([offsets[user] + place for user, place in wanted]),
        np.array([offsets[user] + stops[user] for user, _ in wanted]),
        num,
    )
    assert found.tolist() == [plainly(items, shown, user, place, stops[user], num) for user, place in wanted]


def test_they_replace_the_first_draws_of_their_label_alone(tmp_path: Path) -> None:
    items = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 0, 1, 2]]
    shown = [(0, 2, [7, 2, 8]), (0, 4, [1])]
    store = store_of(tmp_path / "store", items, shown)
    args = DatasetArgs(dataset_name="mine", max_sequence_length=9)
    samples, roles = build_samples(store, args, "retrieval", "train", seed=0), FeatureRoles("item_id", "action", ())
    drawn = []
    for hard in (0, 2):
        negatives = Negatives("uniform", 3, hard=hard)
        reader = StoreReader(store, samples, roles, hard_negatives=hard)
        assembler = Assembler(2, "retrieval", roles, ITEMS, 1, negatives)
        users = np.arange(2)
        batch = Collator(reader.read, assembler)(BatchPlan(users, users, 0, 0, START))
        assert batch.negatives.draws is not None
        drawn.append(batch.features["__negatives__"].values().numpy()[batch.negatives.draws.numpy()])
    # Labels of user 0: the events 1 to 3. The second request closes the first, to which the events 2 and 3 belong.
    without, replaced = drawn
    assert replaced[1:3, :2].tolist() == [[7, 8], [7, 8]]
    changed = np.zeros_like(without, dtype=bool)
    changed[1:3, :2] = True
    np.testing.assert_array_equal(replaced[~changed], without[~changed])
