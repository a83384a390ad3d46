"""Measure other retrieval methods on a store, with the protocol of this trainer's evaluation.

    python scripts/quality/retrieval_peers.py --store tmp_data/ml-1m --output runs/ml_1m_peers

Each method is trained with the settings of its grid (``PEERS``), and stops when NDCG@10 of the validation targets no
longer rises. The setting and the number of epochs with the highest NDCG@10 there are measured on the test targets. With
--trained_on train+valid, that model is trained once more, with the validation targets among its training events, as it
is with DatasetArgs.valid_items = 0.

OUTPUT/trials.jsonl has a line per training. The same command continues where an earlier one was stopped. The printed
table is also in OUTPUT/table.md, or with train+valid in OUTPUT/table_valid_trained.md. With one peer alone,
OUTPUT/peer.json has its mean metrics.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from hstu.base.errors import EXIT_DONE, DataError
from hstu.config.tool import tool
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import retrieval_metrics
from scripts.quality.item_peers import ease, item_knn, popularity
from scripts.quality.leave_one_out import METRICS, HeldOut, Histories, Score, Splits, read_splits, target_ranks
from scripts.quality.means import mean_and_error, number
from scripts.quality.sequence_peers import train_sequences

CHOSEN_BY = "NDCG@10"
_PATIENCE = 4
"""Rounds of epochs without a higher validation metric after which training stops."""
Settings = Mapping[str, Any]
Trial = dict[str, Any]
"""peer, settings, seed, trained_on ("train" or "train+valid"), epochs, seconds, test: metrics, and valid: metrics for
those trained on "train"."""


@dataclass(frozen=True)
class Peer:
    """A method: how it is trained, and the settings among which the validation targets choose."""

    title: str
    fit: Callable[..., Iterator[tuple[int, Score]]]
    """(training events, seed, **settings) → (epochs so far, scores), once per round."""
    grid: tuple[Settings, ...] = ({},)
    is_random: bool = False
    """The seed has an influence."""


def _grid(**values: Sequence[Any]) -> tuple[Settings, ...]:
    """All combinations of the values."""
    grid: list[dict[str, Any]] = [{}]
    for name, choices in values.items():
        grid = [setting | {name: choice} for setting in grid for choice in choices]
    return tuple(grid)


_NEIGHBOURS = {"neighbours": (20, 100, 500), "shrinkage": (0, 20)}
_PENALTIES = {"l2": (100, 200, 400, 800, 1600)}
_HALF_LIVES = (1, 2, 5, 10, 20)
_PUBLISHED: Settings = {"width": 50, "layers": 2, "heads": 1, "learning_rate": 1e-3, "batch": 128}

PEERS: Mapping[str, Peer] = {
    "popularity": Peer("popularity", popularity),
    "item_knn": Peer("item-kNN", item_knn, _grid(**_NEIGHBOURS, half_life=(None,))),
    "item_knn_recent": Peer("item-kNN, recent items weigh more", item_knn, _grid(**_NEIGHBOURS, half_life=_HALF_LIVES)),
    "ease": Peer("EASE", ease, _grid(**_PENALTIES, half_life=(None,))),
    "ease_recent": Peer("EASE, recent items weigh more", ease, _grid(**_PENALTIES, half_life=_HALF_LIVES)),
    "gru4rec": Peer(
        "like GRU4Rec, softmax over all items",
        partial(train_sequences, model="gru4rec", loss="softmax", layers=1, batch=64),
        _grid(width=(64,), dropout=(0.2, 0.4)),
        is_random=True,
    ),
    "sasrec_published": Peer(
        "SASRec as published: one negative, binary cross entropy",
        partial(
            train_sequences, model="sasrec", loss="one_negative", epochs_per_round=10, max_epochs=400, **_PUBLISHED
        ),
        _grid(dropout=(0.2, 0.5)),
        is_random=True,
    ),
    "sasrec_softmax": Peer(
        "SASRec, softmax over all items",
        partial(train_sequences, model="sasrec", loss="softmax", layers=2, heads=2, batch=64),
        _grid(width=(64,), dropout=(0.2, 0.4)),
        is_random=True,
    ),
    "sasrec_unseen": Peer(
        "SASRec, softmax over items not seen before, random windows",
        partial(
            train_sequences, model="sasrec", loss="softmax_unseen", random_windows=True, layers=2, heads=2, batch=64
        ),
        _grid(width=(64,), dropout=(0.2, 0.4)),
        is_random=True,
    ),
}


def _read_trials(file: Path) -> list[Trial]:
    trials = []
    for place, line in enumerate(file.read_text().splitlines(), 1):
        try:
            trials.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{file}:{place} is no JSON; remove that line, and its training is repeated") from error
    return trials


@dataclass(frozen=True)
class Options:
    """What is trained of each peer."""

    seeds: Sequence[int] = (1, 2)
    most_settings: int | None = None
    """The first so many settings of a grid; None: all."""
    trained_on: str = "train"
    """What the measured models learn from: "train" or "train+valid"."""


class Trials:
    """The finished trainings of a store, in a file of JSON lines."""

    def __init__(self, file: Path, splits: Splits) -> None:
        self.file = file
        self.splits = splits
        file.parent.mkdir(parents=True, exist_ok=True)
        self.done = _read_trials(file) if file.is_file() else []

    def train(self, name: str, settings: Settings, seed: int) -> Trial:
        """Train without the validation targets, until they no longer gain."""
        return self._once({"peer": name, "settings": dict(settings), "seed": seed, "trained_on": "train"}, self._search)

    def train_again(self, chosen: Trial) -> Trial:
        """Train with the validation targets, too, for as many epochs as were best without them."""
        key = {name: chosen[name] for name in ("peer", "settings", "seed")} | {"trained_on": "train+valid"}
        return self._once(key, partial(self._repeat, epochs=chosen["epochs"]))

    def _once(self, key: Trial, run: Callable[[Trial], Trial]) -> Trial:
        for trial in self.done:
            if key.items() <= trial.items():
                return trial
        begun = time.perf_counter()
        trial = key | run(key)
        trial["seconds"] = round(time.perf_counter() - begun, 1)
        self.done.append(trial)
        with self.file.open("a") as lines:
            lines.write(json.dumps(trial) + "\n")
        measured = "valid" if "valid" in trial else "test"
        print(f"{_text(key)} epochs={trial['epochs']} {measured}: {_text(trial[measured])} time={trial['seconds']}s")
        return trial

    def _search(self, key: Trial) -> Trial:
        best: Trial = {}
        worse = 0
        for epochs, score in self._fit(key, self.splits.train):
            valid = _metrics(score, self.splits.valid)
            if best and valid[CHOSEN_BY] <= best["valid"][CHOSEN_BY]:
                worse += 1
                if worse == _PATIENCE:
                    break
            else:
                best = {"epochs": epochs, "valid": valid, "test": _metrics(score, self.splits.test)}
                worse = 0
        return best

    def _repeat(self, key: Trial, epochs: int) -> Trial:
        for done, score in self._fit(key, self.splits.train_and_valid):
            if done == epochs:
                return {"epochs": epochs, "test": _metrics(score, self.splits.test)}
        raise ValueError(f"{_text(key)} has no {epochs} epochs")

    @staticmethod
    def _fit(key: Trial, train: Histories) -> Iterator[tuple[int, Score]]:
        return PEERS[key["peer"]].fit(train, key["seed"], **key["settings"])


def measure(trials: Trials, name: str, options: Options) -> list[Trial]:
    """The trial of each seed with the chosen settings.

    The first seed chooses the settings. A peer without a random part has one seed.
    """
    grid = PEERS[name].grid[: options.most_settings]
    seeds = options.seeds if PEERS[name].is_random else options.seeds[:1]
    searched = (trials.train(name, settings, seeds[0]) for settings in grid)
    chosen = max(searched, key=lambda trial: trial["valid"][CHOSEN_BY])
    each = [trials.train(name, chosen["settings"], seed) for seed in seeds]
    return each if options.trained_on == "train" else [trials.train_again(trial) for trial in each]


def _metrics(score: Score, held_out: HeldOut) -> dict[str, float]:
    metrics = retrieval_metrics(METRICS, target_ranks(score, held_out))
    return {name: round(value, 5) for name, value in metrics.items()}


def table(results: Mapping[str, Sequence[Trial]]) -> str:
    """Markdown: a row per peer, mean ± standard error over the seeds, and the settings that were chosen."""
    heads = ["method", *METRICS, "seeds", "epochs", "settings"]
    rows = [heads, ["---"] * len(heads)]
    for name, trials in results.items():
        metrics = [number(*mean_and_error(values)) for values in _test_metrics(trials).values()]
        epochs = ", ".join(str(trial["epochs"]) for trial in trials) if PEERS[name].is_random else ""
        rows.append([PEERS[name].title, *metrics, str(len(trials)), epochs, _text(trials[0]["settings"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _test_metrics(trials: Sequence[Trial]) -> dict[str, list[float]]:
    return {metric: [trial["test"][metric] for trial in trials] for metric in METRICS}


def _text(settings: Settings) -> str:
    return " ".join(_text(value) if isinstance(value, dict) else f"{name}={value}" for name, value in settings.items())


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a store of preprocess_dataset.py")
    parser.add_argument("--output", type=Path, required=True, help="directory of trials.jsonl and table.md")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="the first one chooses the settings")
    parser.add_argument("--most_settings", type=_positive, help="try only the first so many settings of each grid")
    parser.add_argument("--trained_on", choices=("train", "train+valid"), default="train")
    chosen = parser.parse_args(arguments)
    options = Options(chosen.seeds, chosen.most_settings, chosen.trained_on)
    store = SequenceStore.open(chosen.store)
    trials = Trials(chosen.output / "trials.jsonl", read_splits(store))
    results = {name: measure(trials, name, options) for name in PEERS if name in chosen.peers}
    if len(results) == 1:
        means = {metric: float(np.mean(values)) for metric, values in _test_metrics(*results.values()).items()}
        (chosen.output / "peer.json").write_text(json.dumps({"metrics": means}) + "\n")
    text = table(results)
    name = "table.md" if options.trained_on == "train" else "table_valid_trained.md"
    (chosen.output / name).write_text(text + "\n")
    print(
        f"\n{store.name}: {len(trials.splits.test.targets):,} users, {store.cardinality(store.item_feature):,} items\n"
    )
    print(text)
    return EXIT_DONE


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
