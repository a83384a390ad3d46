"""Hard negatives: what a user was shown and did not take, as negatives of the events after it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.negatives import Negatives, shown_not_taken
from hstu.data.sampling.sampler import START, BatchPlan
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import write_small_store

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
