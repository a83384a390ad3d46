"""Measure retrieval methods without gradients beside HSTU: popularity, item-kNN of implicit, and EASE.

    python scripts/quality/retrieval_peers.py --store tmp_data/ml-1m [--valid_items 0] [--output peers.json]

The protocol is that of a retrieval run with the same DatasetArgs.valid_items. The last item of each user is to be found
among all items of the store, without those that the user has seen. The item before it chooses a method's settings.
"recent" lets an item of a history weigh half as much after some later ones; the published methods do not.

implicit is an optional dependency (pip install ".[quality]"). SASRec and GRU4Rec are not here, because RecTools needs
NumPy below 2, and RecBole needs Ray 2.6 or older.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy import sparse

from hstu.base.errors import EXIT_DONE, ConfigError, DataError
from hstu.config.args import DatasetArgs
from hstu.config.cli import tool
from hstu.data.batches.jagged import ranges, run_indices
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import retrieval_metrics
from scripts.quality.means import number

METRICS = ("NDCG@10", "HR@10", "HR@50", "MRR")
HALF_LIVES = (1, 2, 5, 10, 20)
PENALTIES = (100, 200, 400, 800, 1600)
NEIGHBOURS = 500
MOST_ITEMS = 30_000
"""Items × items in float64 take 7 GB there, of which EASE needs two."""
Settings = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Histories:
    """Items of U users, one user after another, oldest first. Each history equals itself only, so that it can be a key.

    Args:
        items: int64 [n], each below ``num_items``.
        lengths: int64 [U].
        targets: the item after each history, int64 [U]; None for histories to learn from.
    """

    items: np.ndarray
    lengths: np.ndarray
    num_items: int
    targets: np.ndarray | None = None

    @classmethod
    def of(cls, store: SequenceStore, split: str, valid_items: int) -> Histories:
        """The histories of a split of a run, also those events that are too old for a model's sequence."""
        args = DatasetArgs(dataset_name=store.name, max_sequence_length=200, valid_items=valid_items)
        samples = build_samples(store, args, "retrieval", split, seed=0)  # type: ignore[arg-type]
        sequence = np.asarray(store.sequence(store.item_feature)).astype(np.int64)
        lengths = (samples.stop if samples.target is None else samples.target) - samples.history_begin
        targets = None if samples.target is None else sequence[samples.target]
        items = sequence[ranges(samples.history_begin, lengths)]
        return cls(items, lengths, store.cardinality(store.item_feature), targets)

    def matrix(self, half_life: float | None = None) -> sparse.csr_array:
        """float32 [U, num_items]: 1 for each item of a history, or 0.5^(later items / half_life)."""
        user, place = run_indices(self.lengths)
        later = self.lengths[user] - 1 - place
        weights = np.ones(len(later)) if half_life is None else 0.5 ** (later / half_life)
        newest = np.unique((user * self.num_items + self.items)[::-1], return_index=True)[1]
        kept = len(later) - 1 - newest
        shape = (len(self.lengths), self.num_items)
        return sparse.csr_array((weights[kept].astype(np.float32), (user[kept], self.items[kept])), shape=shape)


def popularity(train: Histories) -> np.ndarray:
    """Scores that do not depend on the history: the number of training events of each item."""
    return np.bincount(train.items, minlength=train.num_items)


@lru_cache(maxsize=1)
def item_knn(train: Histories) -> sparse.csr_array:
    """Cosines to the nearest items, by implicit."""
    try:
        nearest = importlib.import_module("implicit.nearest_neighbours")
    except ImportError:
        raise ConfigError('implicit is not installed; install it with pip install ".[quality]"') from None
    model = nearest.CosineRecommender(K=NEIGHBOURS + 1)  # the item itself is one of them
    model.fit(sparse.csr_matrix(train.matrix()), show_progress=False)
    return sparse.csr_array(model.similarity.T)


@lru_cache(maxsize=1)
def ease(train: Histories, l2: float) -> np.ndarray:
    """EASE (arXiv 1905.03375): the linear model of a history by itself with the smallest loss and a zero diagonal."""
    if train.num_items > MOST_ITEMS:
        raise DataError(f"the data has {train.num_items:,} items, and EASE keeps a matrix of items × items in memory; "
                        f"allowed are {MOST_ITEMS:,}; leave it out with --peers")  # fmt: skip
    matrix = train.matrix()
    inverse = np.linalg.inv((matrix.T @ matrix).toarray().astype(np.float64) + l2 * np.eye(train.num_items))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights.astype(np.float32)


def _grid(**values: Iterable[Any]) -> list[Settings]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


PEERS: Mapping[str, tuple[Callable[..., Any], list[Settings]]] = {
    "popularity": (popularity, [{}]),
    "item_knn": (item_knn, [{}]),
    "item_knn_recent": (item_knn, _grid(half_life=HALF_LIVES)),
    "ease": (ease, _grid(l2=PENALTIES)),
    "ease_recent": (ease, _grid(l2=PENALTIES, half_life=HALF_LIVES)),
}
"""Method → what it learns (item × item weights, or scores of all items), and the settings that validation chooses."""


def metrics_of(weights: Any, histories: Histories, half_life: float | None = None) -> dict[str, float]:
    """Metrics of the targets, ranked among all items that are not in the history. Equal scores get midranks."""
    assert histories.targets is not None
    seen, users = histories.matrix(), np.arange(len(histories.targets))
    scores = weights if weights.ndim == 1 else histories.matrix(half_life) @ weights
    dense = np.asarray(scores.toarray() if sparse.issparse(scores) else scores)
    dense = np.broadcast_to(dense, (len(users), histories.num_items)).astype(np.float64)
    own = dense[users, histories.targets]
    dense[seen.nonzero()] = -np.inf
    dense[users, histories.targets] = own
    higher, equal = (compare(dense, own[:, None]).sum(axis=1) for compare in (np.greater, np.equal))
    return retrieval_metrics(METRICS, 1 + higher + (equal - 1) / 2)


def measure(store: SequenceStore, name: str, valid_items: int) -> tuple[Settings, dict[str, float]]:
    """The settings with the best NDCG@10 on validation, and the metrics of the test targets with them."""
    fit, grid = PEERS[name]
    train, valid = (Histories.of(store, split, 1) for split in ("train", "valid"))

    def fitted(histories: Histories, settings: Settings) -> Any:
        return fit(histories, **{key: value for key, value in settings.items() if key != "half_life"})

    def on_validation(settings: Settings) -> float:
        return round(metrics_of(fitted(train, settings), valid, settings.get("half_life"))["NDCG@10"], 5)

    chosen = max(grid, key=on_validation) if len(grid) > 1 else grid[0]
    learnt = fitted(Histories.of(store, "train", valid_items), chosen)
    return chosen, metrics_of(learnt, Histories.of(store, "test", valid_items), chosen.get("half_life"))


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a store of preprocess_dataset.py")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="only these")
    parser.add_argument("--valid_items", type=int, choices=(0, 1), default=1, help="0: learn from that item, too")
    parser.add_argument("--output", type=Path, help="also write the mean metrics of the last method here, as JSON")
    options = parser.parse_args(arguments)
    store = SequenceStore.open(options.store)
    print(f"| method | {' | '.join(METRICS)} | settings |\n|{'---|' * (len(METRICS) + 2)}")
    for name in options.peers:
        settings, metrics = measure(store, name, options.valid_items)
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        print(f"| {name} | {' | '.join(number(metrics[metric]) for metric in METRICS)} | {shown} |", flush=True)
        if options.output:
            options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
