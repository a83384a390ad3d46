"""Peers of retrieval against brute force on small data, and as a command."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hstu.base.errors import DataError
from hstu.config.args import DatasetArgs
from hstu.data.sampling.samples import build_samples
from hstu.train.baselines import popularity_baseline
from hstu.train.metrics import retrieval_metrics
from scripts.quality import retrieval_peers
from scripts.quality.item_peers import ease, ease_weights, item_knn, popularity
from scripts.quality.leave_one_out import METRICS, HeldOut, Histories, read_splits, target_ranks
from scripts.quality.retrieval_peers import PEERS, Peer, Trials, main
from scripts.quality.sequence_peers import MODELS, draw_unseen, next_item_loss, train_sequences

ITEMS = 12


def random_rows(seed: int, users: int = 30, most: int = 9) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(ITEMS)[: rng.integers(4, most)].tolist() for _ in range(users)]


def histories(rows: list[list[int]]) -> Histories:
    return Histories(np.concatenate(rows), np.array([len(row) for row in rows]), ITEMS)


def test_splits_are_those_of_a_run_and_popularity_is_its_baseline(make_store) -> None:
    rows = random_rows(0)
    store = make_store([*rows, [3, 1]], num_items=ITEMS)  # the last user has nothing to train on
    splits = read_splits(store)
    assert splits.train.items.tolist() == [item for row in rows for item in row[:-2]]
    assert splits.train_and_valid.items.tolist() == [item for row in rows for item in row[:-1]]
    assert splits.valid.targets.tolist() == [row[-2] for row in rows]
    assert splits.test.targets.tolist() == [*(row[-1] for row in rows), 1]
    assert splits.test.histories.items.tolist() == [*(item for row in rows for item in row[:-1]), 3]

    args = DatasetArgs(dataset_name="toy", max_sequence_length=200)
    train, test = (build_samples(store, args, "retrieval", split, 0) for split in ("train", "test"))
    _, score = next(popularity(splits.train, 0))
    found = retrieval_metrics(METRICS, target_ranks(score, splits.test))
    assert found == pytest.approx(popularity_baseline(store, train, test, METRICS))


def test_data_with_a_split_of_its_own_is_refused(make_store) -> None:
    store = make_store(random_rows(0), num_items=ITEMS)
    store.split = "part"
    with pytest.raises(DataError, match=r"column 'part'.*without --split"):
        read_splits(store)


def test_ranks_leave_out_what_was_seen_but_not_the_target() -> None:
    rows = [[0, 1, 2], [5, 3], [4]]
    scores = np.array([[9, 9, 9, 5, 5, 7, *[0] * 6], [0] * 12, [5, 6, 7, 8, 9, *[0] * 7]])
    # User 0: 5 is better, 3 equal. User 1: all equal, 10 others. User 2: the target is in the history.
    held_out = HeldOut(histories(rows), np.array([4, 7, 4]))
    assert target_ranks(lambda h: scores, held_out).tolist() == [2.5, 5.5, 1]


@pytest.mark.parametrize("half_life", [None, 2.0])
def test_item_knn_equals_loops(half_life: float | None) -> None:
    rows = random_rows(1)
    sets = [set(row) for row in rows]
    users = [sum(item in row for row in sets) for item in range(ITEMS)]
    similarity = np.zeros((ITEMS, ITEMS))
    for i in range(ITEMS):
        for j in set(range(ITEMS)) - {i}:
            similarity[i, j] = sum({i, j} <= row for row in sets) / (np.sqrt(users[i] * users[j]) + 3)
    expected = np.zeros((len(rows), ITEMS))
    for user, row in enumerate(rows):
        for item in range(ITEMS):
            limit = sorted(similarity[item])[-4]
            for later, seen in enumerate(reversed(row)):
                if similarity[item, seen] >= limit:
                    expected[user, item] += similarity[item, seen] * (0.5 ** (later / half_life) if half_life else 1)
    _, score = next(item_knn(histories(rows), 0, neighbours=4, shrinkage=3, half_life=half_life))
    np.testing.assert_allclose(score(histories(rows)), expected, rtol=1e-5)


def test_ease_is_the_ridge_regression_of_each_item_on_the_others() -> None:
    rows = random_rows(2)
    matrix = histories(rows).matrix().astype(np.float64)
    weights = ease_weights(histories(rows).co_occurrences, l2=2.0)
    for item in range(ITEMS):
        others = np.delete(np.arange(ITEMS), item)
        x, y = matrix[:, others], matrix[:, item]
        np.testing.assert_allclose(weights[others, item], np.linalg.solve(x.T @ x + 2 * np.eye(ITEMS - 1), x.T @ y))
    assert (np.diag(weights) == 0).all()
    _, score = next(ease(histories(rows), 0, l2=2.0, half_life=None))
    np.testing.assert_allclose(score(histories(rows)), matrix @ weights, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_a_place_does_not_depend_on_later_items_nor_on_padding(model: str) -> None:
    torch.manual_seed(0)
    sizes = {"heads": 2} if model == "sasrec" else {}
    network = MODELS[model](ITEMS, length=8, width=8, layers=2, dropout=0.5, **sizes).eval()
    items, lengths = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([5])
    later = network(torch.tensor([[1, 2, 3, 9, 8]]), lengths)
    torch.testing.assert_close(network(items, lengths)[:, :3], later[:, :3])
    assert (network(items, lengths)[:, 3:] != later[:, 3:]).any()
    padded = torch.cat([items, torch.full((1, 3), ITEMS)], dim=1)
    torch.testing.assert_close(network(padded, lengths)[:, :5], network(items, lengths))


@pytest.mark.parametrize("loss", ["softmax", "softmax_unseen"])
def test_softmax_and_its_gradients_equal_autograd(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.quality.sequence_peers._ROWS", 4)
    torch.manual_seed(0)
    network = MODELS["sasrec"](ITEMS, length=8, width=8, layers=1, dropout=0.0, heads=1)
    rows = [[1, 2, 3, 1, 2, 5], [7, 7, 4], [6, 0]]
    window = torch.tensor([row + [ITEMS] * (6 - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    found = next_item_loss(network, window, lengths, ITEMS, loss)  # type: ignore[arg-type]
    slopes = torch.autograd.grad(found, list(network.parameters()))

    vectors, losses = network(window[:, :-1], lengths - 1), []
    for user, row in enumerate(rows):
        for place, label in enumerate(row[1:]):
            hidden = set(row[: place + 1]) - {label} if loss == "softmax_unseen" else set()
            left = [item for item in range(ITEMS) if item not in hidden]
            logits = network.items.weight[left] @ vectors[user, place]
            losses.append(F.cross_entropy(logits, torch.tensor(left.index(label))))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found, expected)
    for slope, wanted in zip(slopes, torch.autograd.grad(expected, list(network.parameters())), strict=True):
        torch.testing.assert_close(slope, wanted)


def test_negatives_are_items_that_are_not_in_the_history() -> None:
    window = torch.tensor([list(range(ITEMS)), [*range(4, ITEMS), *[ITEMS] * 4]])
    draws = torch.cat([draw_unseen(window, ITEMS) for _ in range(50)], dim=1)
    assert set(draws[1].tolist()) == {0, 1, 2, 3}
    assert set(draws[0].tolist()) == set(range(ITEMS))


@pytest.mark.parametrize("model, loss", [("sasrec", "one_negative"), ("gru4rec", "softmax")])
def test_sequence_models_learn_which_item_follows(model: str, loss: str) -> None:
    rng = np.random.default_rng(0)
    rows = [[(int(first) + step) % ITEMS for step in range(6)] for first in rng.integers(0, ITEMS, 64)]
    sizes = {"width": 16, "layers": 1, "dropout": 0.0} | ({"heads": 1} if model == "sasrec" else {})
    fit = train_sequences(
        histories(rows), 1, model=model, loss=loss, length=4, random_windows=True, batch=16, learning_rate=0.01,
        max_epochs=20, epochs_per_round=20, **sizes,
    )  # fmt: skip
    epochs, score = next(fit)
    held_out = HeldOut(histories([row[:-1] for row in rows]), np.array([row[-1] for row in rows]))
    assert epochs == 20 and target_ranks(score, held_out).mean() < 1.1


class Counted:
    """A peer whose rounds have given scores of the target's item; counts how often it is trained."""

    trainings = 0

    def fit(self, train: Histories, seed: int, gains: list[float]):
        Counted.trainings += 1
        for epoch, gain in enumerate(gains, 1):
            yield epoch, partial(self.score, gain)

    @staticmethod
    def score(gain: float, h: Histories) -> np.ndarray:
        """The better, the more often the items that follow are first."""
        last = h.items[np.cumsum(h.lengths) - 1]
        scores = np.random.default_rng(0).random((len(h), ITEMS))
        scores[np.arange(len(h)), (last + 1) % ITEMS] += gain
        return scores


def test_validation_chooses_epochs_and_settings_and_a_second_command_only_reads(
    make_store, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    rows = [[(first + step) % ITEMS for step in range(6)] for first in range(ITEMS)]
    store = make_store(rows, num_items=ITEMS)
    grid = ({"gains": [0.1, 0.6, 0.3, 0.2, 0.1, 0.0, 9.0]}, {"gains": [0.4]})  # 9.0 comes after four worse rounds
    monkeypatch.setattr(
        retrieval_peers, "PEERS", {"counted": Peer("Counted", Counted().fit, grid, is_random=True), **PEERS}
    )
    Counted.trainings = 0
    command = ["--store", str(store.path), "--output", str(tmp_path / "out"), "--peers", "counted", "popularity"]
    assert main([*command, "--seeds", "1", "2", "--trained_on", "train+valid"]) == 0
    first = capsys.readouterr().out
    assert Counted.trainings == 2 + 1 + 2  # two settings, another seed, and both seeds again
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    chosen = [trial for trial in trials if trial["trained_on"] == "train+valid"]
    assert [trial["epochs"] for trial in chosen] == [2, 2, 0]
    assert main([*command, "--seeds", "1", "2", "--trained_on", "train+valid"]) == 0
    assert Counted.trainings == 5
    assert capsys.readouterr().out.split("\n\n")[-1] == first.split("\n\n")[-1]
    assert (tmp_path / "out" / "table_valid_trained.md").read_text() in first
    assert main([*command[:-1], "--seeds", "1"]) == 0
    written = json.loads((tmp_path / "out" / "peer.json").read_text())
    assert written == {"metrics": trials[0]["test"]}


def test_an_interrupted_line_of_trials_is_told(make_store, tmp_path) -> None:
    splits = read_splits(make_store(random_rows(0), num_items=ITEMS))
    (tmp_path / "trials.jsonl").write_text('{"peer": "ea')
    with pytest.raises(DataError, match=r"trials.jsonl:1.*remove that line"):
        Trials(tmp_path / "trials.jsonl", splits)
