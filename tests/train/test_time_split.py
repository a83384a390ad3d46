"""Retrieval split in time: its samples and targets, what is new to training, and that nothing after the cut is used."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.config.args import DatasetArgs, Task
from hstu.config.rules import validate
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.splits import Period, Split
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.conftest import write_small_store
from tests.data.collators import assert_same
from tests.data.toy_store import store_of
from tests.distributed.launch import Launch, run_cases
from tests.train.conftest import OpenSource
from tests.train.tiny import ITEMS, build, tiny_config

SPLIT: dict[str, Any] = {"split": "time", "train_fraction": 0.6}
Measured = tuple[dict[str, float], dict[str, np.ndarray], list[np.ndarray]]


def events(redrawn: int = 0) -> pd.DataFrame:
    """Events of 30 users by user and time, with equal times. ``redrawn``: seed of all that comes after the cut."""
    rng = np.random.default_rng(7)
    users = np.repeat(np.arange(30), rng.integers(1, 12, 30))
    found = pd.DataFrame({"user": users, "time": rng.integers(0, 60, len(users)) * 10 + 1_000_000 + 5 * users})
    found = found.sort_values(["user", "time"], kind="stable", ignore_index=True)
    cut = found.time.sort_values(ignore_index=True)[int(SPLIT["train_fraction"] * len(found))]
    found["later"] = found.time >= cut
    later = np.random.default_rng(redrawn)
    for column, high in (("item", 8), ("price", 50)):
        drawn = later.integers(0, ITEMS, len(found))
        found[column] = np.where(found.later, drawn, rng.integers(0, high, len(found)))
    moved = np.where(found.time == cut, cut, cut + 1 + np.sort(later.integers(0, 1000, len(found))))
    found["time"] = np.where(found.later & bool(redrawn), moved, found.time)
    found["place"] = found.groupby("user").cumcount()
    return found


def store_at(path: Path, redrawn: int = 0) -> SequenceStore:
    def lists(column: str) -> list[list[int]]:
        return [rows.tolist() for _, rows in events(redrawn).groupby("user")[column]]

    prices: Any = {"price": lists("price")}
    return write_small_store(path, lists("item"), timestamps=lists("time"), event_numbers=prices, num_items=ITEMS)


@pytest.fixture
def cut_store(tmp_path: Path) -> SequenceStore:
    return store_at(tmp_path / "store")


def expected(valid_items: int, split: Split) -> dict[int, tuple[list[int], int]]:
    """user → (newest events of the history, target or -1) by a plain reference, in numbers of the rows of events()."""
    found = {}
    for user, rows in events().groupby("user"):
        before, after = rows.index[~rows.later].tolist(), rows.index[rows.later].tolist()
        if split == "train":
            history, target = before[: len(before) - valid_items], -1
        elif split == "valid":
            history, target = before[:-1], before[-1] if before else -1
        else:
            history, target = before, after[0] if after else -1
        if len(history) >= (2 if split == "train" else 1) and (split == "train" or target >= 0):
            found[int(str(user))] = history[-4:], target
    return found


@pytest.mark.parametrize(("valid_items", "split"), [(0, "train"), (1, "train"), (1, "valid"), (0, "test"), (1, "test")])
def test_samples_and_targets_equal_a_plain_reference(valid_items: int, split: Split, cut_store: SequenceStore) -> None:
    args = DatasetArgs(dataset_name="toy", max_sequence_length=4, valid_items=valid_items, **SPLIT)
    samples = build_samples(cut_store, args, "retrieval", split, seed=0)
    targets = [-1] * len(samples) if samples.target is None else samples.target.tolist()
    histories = [list(range(*bounds)) for bounds in zip(samples.start, samples.stop, strict=True)]
    found = dict(zip(samples.user.tolist(), zip(histories, targets, strict=True), strict=True))
    assert found == expected(valid_items, split) and len(found) > 10


@pytest.mark.parametrize(("candidates", "first"), [(0, False), (0, True), (2, False)])
def test_a_period_labels_each_event_once_after_as_much_history_as_fits(
    candidates: int, first: bool, cut_store: SequenceStore
) -> None:
    args = DatasetArgs(dataset_name="toy", max_sequence_length=6, max_num_candidates=candidates)
    rows, since, until = events(), 1_000_150, 1_000_400
    chosen = rows[(rows.time >= since) & (rows.time < until)]
    chosen = chosen.groupby("user").head(1) if first else chosen
    chosen = chosen[chosen.place > 0] if candidates else chosen
    samples = build_samples(cut_store, args, "ranking", Period(since, until, first), seed=0)
    labelled = [np.arange(stop - count, stop) for stop, count in zip(samples.stop, samples.num_labels, strict=True)]
    assert sorted(np.concatenate(labelled)) == chosen.index.tolist() and len(chosen) > 15
    histories, is_whole = samples.lengths - samples.num_labels, samples.start == samples.history_begin
    assert (is_whole | (histories >= (4 if candidates else 3))).all() and (first or not is_whole.all())


def test_a_period_draws_the_same_samples_for_any_run_and_more_of_them_for_more(cut_store: SequenceStore) -> None:
    args, limits = DatasetArgs(dataset_name="toy", max_sequence_length=6), (8, 20, 1000)
    tasks: tuple[Task, ...] = ("retrieval", "ranking")
    for task in tasks:
        drawn = [build_samples(cut_store, args, task, Period(1_000_150, most=most), seed=most) for most in limits]
        small, large, whole = ([*zip(each.user, each.stop, strict=True)] for each in drawn)
        assert {*small} < {*large} < {*whole} and large == [each for each in whole if each in large] != whole[:20]
        labels = [len(each) if task == "retrieval" else each.num_labels.sum() for each in drawn]
        assert [labels[2] - each for each in labels] == [each.report["not_drawn"] for each in drawn]
        assert all(most - 6 < count <= most for most, count in zip((8, 20), labels, strict=False))


def measured(mesh: Mesh, path: str, output: str) -> Measured:
    """Metrics of the test, what is new, and this rank's users, items and ranks."""
    trainer = build(tiny_config("retrieval", path, output, dataset=SPLIT), mesh)
    seen = trainer.evaluator.observe(trainer.source.eval_batches("test"))
    new = {name: np.asarray(ids) for name, ids in trainer.source.newcomers.items()}
    return trainer.evaluator.metrics_of_all(seen), new, [seen.users, seen.items, seen.results]


def test_what_is_new_to_training_stands_apart_on_any_number_of_ranks(cut_store: SequenceStore, tmp_path: Path) -> None:
    results: list[list[Measured]] = []
    for size in (1, 2):
        case = {"case": partial(measured, path=str(cut_store.path), output=f"{tmp_path}/{size}")}
        results.append([each["case"] for each in run_cases(Launch(size, timeout_s=120), case)])
    metrics, new, (users, items, ranks) = results[0][0]
    trained, rows = expected(1, "train"), events()
    known = rows[rows.user.isin(list(trained)) & ~rows.later]
    known = known[known.place < known.groupby("user").place.transform("max")]  # the last one is for validation
    assert new["new_users"].tolist() == sorted(set(range(30)) - set(trained))
    assert new["new_items"].tolist() == sorted(set(range(ITEMS)) - set(known["item"]))
    tested = {user: int(rows["item"].to_numpy()[target]) for user, (_, target) in expected(1, "test").items()}
    assert dict(zip(users.tolist(), items.tolist(), strict=True)) == tested
    for group, of_rows in (("new_users", users), ("new_items", items)):
        is_new = np.isin(of_rows, new[group])
        assert 0 < is_new.sum() < len(users)
        assert metrics[f"HR@3/{group}"] == pytest.approx((ranks[is_new] <= 3).mean())
        assert metrics[f"MRR/{group}"] == pytest.approx((1 / ranks[is_new]).mean())
    assert metrics["HR@3"] == pytest.approx((ranks <= 3).mean()) and len(metrics) == 9
    for found, _, (own, _, _) in results[1]:
        assert found == pytest.approx(metrics) and len(own) < len(users)


def test_training_uses_nothing_after_the_cut(cut_store: SequenceStore, source: OpenSource, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "dataset": {**SPLIT, "max_sequence_length": 4, "shuffle_ties": True, "window_stride": 2}
        | {"side_feature_names": ["price"]},
        "task_args": {"negatives": "mixed", "num_negatives": 5, "logq_correction": True, "mask_seen": True},
        "network": {"position_encoding": "relative_bias"},
    }
    redrawn_store = store_at(tmp_path / "redrawn", redrawn=3)
    assert not np.array_equal(cut_store.sequence("item_id"), redrawn_store.sequence("item_id"))
    one, other = (source("retrieval", store=each, **options) for each in (cut_store, redrawn_store))
    batches = zip(range(20), *(each.train_batches(SamplerPosition()) for each in (one, other)), strict=False)
    for _, batch, redrawn in batches:
        assert_same(batch, redrawn)
    assert np.array_equal(one.item_counts, other.item_counts) and one.item_counts.sum() > 0
    assert one.number_statistics == other.number_statistics
    assert torch.equal(*(each.log_counts().log_counts for each in (one, other)))  # type: ignore[union-attr]
    assert one.trained_on != other.trained_on, "other times are other data"


def test_a_fraction_without_a_cut_is_reported(cut_store: SequenceStore, tmp_path: Path) -> None:
    (said,) = validate(tiny_config("retrieval", cut_store, tmp_path, dataset={"train_fraction": 0.5}), 1)
    assert "train_fraction = 0.5: has no effect with DatasetArgs.split = 'auto'" in said
    args = DatasetArgs(dataset_name="toy", max_sequence_length=4, **SPLIT)
    with pytest.raises(ConfigError, match="needs timestamps"):
        build_samples(store_of(5, 6), args, "retrieval", "train", 0)
