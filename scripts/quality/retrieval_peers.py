"""Measure retrieval methods of RecTools beside HSTU: popularity, item-kNN, EASE, GRU4Rec, SASRec, eSASRec, BERT4Rec.

    python scripts/quality/retrieval_peers.py --store tmp_data/ml-100k --peers sasrec [--seed 1]

The protocol is that of a retrieval run with DatasetArgs.valid_items = 1. The last item of each user is to be found
among all items of the store, without those that the user has seen. The item before it chooses among the trials of a
method and, of a sequence model, the epoch; nothing is trained on it. With --train_fraction the data is cut in time, as
by DatasetArgs.split = "time": each user's first item after the cut is to be found, from all events before the cut.
See docs/benchmarks/quality/retrieval_peers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch

from hstu.base.errors import EXIT_DONE
from hstu.config.args import DatasetArgs
from hstu.config.cli import tool
from hstu.data.batches.jagged import ranges, run_indices
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.sweep.trial import number
from hstu.train.metrics import retrieval_metrics

try:
    from implicit.nearest_neighbours import CosineRecommender
    from pytorch_lightning import seed_everything
    from rectools import models
    from rectools.dataset import Dataset, IdMap, Interactions
    from rectools.models.nn.transformers.lightning import TransformerLightningModule
    from rectools.models.nn.transformers.ligr import LiGRLayers
    from rectools.models.nn.transformers.net_blocks import TransformerLayersBase
except ImportError as error:
    sys.exit(f"error: {error}; docs/benchmarks/quality/retrieval_peers/README.md says how to install RecTools")

METRICS = ("NDCG@10", "HR@10", "HR@50", "MRR")
MOST_EPOCHS, EVERY, PATIENCE = 60, 2, 3
"""A sequence model trains until NDCG@10 on validation has not risen in PATIENCE evaluations, one every EVERY epochs."""
RANKED, USERS_AT_ONCE = 1000, 1024
"""A target that is not among so many first items counts as not found; the rest would add less than .001 to MRR."""


class RealTargets(TransformerLightningModule):
    """The loss of RecTools without the logits of padding, which it ignores, and with negatives taken from the logits of
    all items, not from copies of their vectors: equal, and several times faster."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        items, real = self.torch_model.item_model.get_all_embeddings(), batch["y"] != 0
        targets = batch["y"][real][:, None]
        sessions = self.torch_model.encode_sessions(batch, items)[real][:, None]
        logits = self.torch_model.similarity_module(sessions, items)
        if "negatives" in batch:
            logits = logits.gather(-1, torch.cat([targets[..., None], batch["negatives"][real][:, None]], -1))
        return self.loss_calculator(logits, targets, batch["yw"][real][:, None])


class AllItems(Dataset):
    """Also the items that nobody has chosen yet have a column, so that all histories have the same ones."""

    def get_user_item_matrix(self, *args: Any, **kwargs: Any) -> Any:
        """[users, items], sparse."""
        return super().get_user_item_matrix(*args, **{**kwargs, "include_warm_items": True})


class EASE(models.EASEModel):
    """RecTools 0.19.0 multiplies histories by the transpose of EASE's matrix, which makes it much weaker."""

    def _fit(self, dataset: Dataset) -> None:
        super()._fit(dataset)
        self.weight: np.ndarray = self.weight.T  # a view: ranking by a copy of contiguous rows is 200 times slower


class GRULayers(TransformerLayersBase):
    """A recurrent network where SASRec has attention, as in GRU4Rec; all else is the same."""

    def __init__(self, n_blocks: int, n_factors: int, n_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.network = torch.nn.GRU(n_factors, n_factors, n_blocks, batch_first=True)

    def forward(self, seqs: torch.Tensor, timeline_mask: torch.Tensor, *_: Any, **__: Any) -> Any:
        """[B, T, n_factors] → the same shape."""
        return self.network(seqs * timeline_mask)[0]


def _sequence(kind: Callable[..., Any], train: Histories, width: int, dropout: float, **settings: Any) -> Any:
    """Reads the newest items, as many as 99 % of the histories have, at most 200."""
    length = int(min(200, np.quantile(np.unique(train.user, return_counts=True)[1], 0.99)))
    return kind(
        n_factors=width, dropout_rate=dropout, n_heads=2, session_max_len=length, lightning_module_type=RealTargets,
        batch_size=32 if len(train.users) < 10_000 else 128, epochs=MOST_EPOCHS, **settings,
    )  # fmt: skip


def _knn(neighbours: int, **_: Any) -> Any:
    return models.ImplicitItemKNNWrapperModel(CosineRecommender(K=neighbours))


def _ease(l2: float, **_: Any) -> Any:
    return EASE(regularization=l2)


def _grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


_SASREC, _SIZES = partial(_sequence, models.SASRecModel), _grid(width=(64, 128), dropout=(0.2, 0.5))
_LIGR = {"transformer_layers_type": LiGRLayers, "loss": "sampled_softmax", "n_negatives": 256}
PEERS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "popularity": (lambda **_: models.PopularModel(), [{}]),
    "item_knn": (_knn, _grid(neighbours=(50, 100, 200, 500))),
    "item_knn_recent": (_knn, _grid(neighbours=[500], half_life=(1, 2, 5, 10))),
    "ease": (_ease, _grid(l2=(100, 200, 400, 800))),
    "ease_recent": (_ease, _grid(l2=(400, 800), half_life=(2, 5))),
    "gru4rec": (partial(_SASREC, transformer_layers_type=GRULayers, n_blocks=1), _SIZES),
    "sasrec": (_SASREC, _SIZES),
    "esasrec": (partial(_SASREC, **_LIGR), _SIZES),
    "bert4rec": (partial(_sequence, models.BERT4RecModel), _SIZES),
}
"""Method → its model and trials. "recent" lets an item of a history weigh half as much after ``half_life`` later ones;
the published methods do not."""


@dataclass(frozen=True, eq=False)
class Histories:
    """What U users of a split have done before their targets.

    Args:
        user, item, later: row of the user, the item, and how many items of the user follow it, int64 [events].
        users, targets: row of each user, and the item to find, int64 [U]. targets is None in training.
        shape: users and items of the store.
    """

    user: np.ndarray
    item: np.ndarray
    later: np.ndarray
    users: np.ndarray
    targets: np.ndarray | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, store: SequenceStore, part: str, **cut: Any) -> Histories:
        """The histories of a part of a run's data, also those events that are too old for a model's sequence."""
        args = DatasetArgs(dataset_name=store.name, max_sequence_length=200, valid_items=1, **cut)
        samples = build_samples(store, args, "retrieval", part, seed=0)  # type: ignore[arg-type]
        sequence = np.asarray(store.sequence(store.item_feature)).astype(np.int64)
        lengths = (samples.stop if samples.target is None else samples.target) - samples.history_begin
        row, place = run_indices(lengths)
        items, targets = sequence[ranges(samples.history_begin, lengths)], samples.target
        shape = store.num_users, store.cardinality(store.item_feature)
        targets = None if targets is None else sequence[targets]
        return cls(samples.user[row], items, lengths[row] - 1 - place, samples.user, targets, shape)

    def dataset(self, half_life: float | None = None) -> Dataset:
        """For RecTools, with the store's numbers of users and items."""
        weight = np.ones(len(self.item)) if half_life is None else np.maximum(0.5 ** (self.later / half_life), 1e-9)
        moment = pd.to_datetime(-self.later, unit="s")
        events = pd.DataFrame({"user_id": self.user, "item_id": self.item, "weight": weight, "datetime": moment})
        return AllItems(*(IdMap(np.arange(size)) for size in self.shape), Interactions(events))

    def ranks(self, model: Any, half_life: float | None, among: int) -> np.ndarray:
        """Of the targets, among the first ``among`` items that are not in the history, float64 [U]; inf: not there."""
        assert self.targets is not None
        dataset, found = self.dataset(half_life), np.full(len(self.users), np.inf)
        for begin in range(0, len(self.users), USERS_AT_ONCE):
            users = self.users[begin : begin + USERS_AT_ONCE]
            lists = model.recommend(users, dataset, min(among, self.shape[1]), True, on_unsupported_targets="ignore")
            row = begin + np.searchsorted(users, lists["user_id"])
            hit = self.targets[row] == lists["item_id"]
            found[row[hit]] = lists["rank"][hit]
        return found


def fit(model: Any, train: Histories, valid: Histories, half_life: float | None) -> tuple[float, int]:
    """Train a model; a sequence model ends with its best weights. Returns NDCG@10 on validation, and their epoch."""

    def on_validation() -> float:
        return retrieval_metrics(["NDCG@10"], valid.ranks(model, half_life, among=10))["NDCG@10"]

    dataset = train.dataset()
    if not hasattr(model, "epochs"):
        model.fit(dataset)
        return on_validation(), 0
    best, epoch, weights = -1.0, 0, None
    for done in range(EVERY, MOST_EPOCHS + 1, EVERY):
        model.fit_partial(dataset, min_epochs=EVERY, max_epochs=EVERY)
        value = on_validation()
        print(f"epoch {done}: NDCG@10 on validation {value:.4f}", file=sys.stderr)
        if value > best:
            best, epoch, weights = value, done, copy.deepcopy(model.torch_model.state_dict())
        elif done - epoch >= PATIENCE * EVERY:
            break
    model.torch_model.load_state_dict(weights)
    return best, epoch


def measure(
    store: SequenceStore, name: str, seed: int, trials: Sequence[int], cut: Mapping[str, Any]
) -> tuple[str, pd.DataFrame]:
    """The settings with the best NDCG@10 on validation, in words, and each user's rank of the test target."""
    build, grid = PEERS[name]
    train, valid, test = (Histories.of(store, part, **cut) for part in ("train", "valid", "test"))
    best, words, ranks = -1.0, "", np.zeros(0)
    for settings in [grid[trial] for trial in trials] or grid:
        seed_everything(seed, verbose=False)
        began, half_life, model = time.monotonic(), settings.get("half_life"), build(train=train, **settings)
        value, epoch = fit(model, train, valid, half_life)
        text = " ".join(f"{key}={each}" for key, each in settings.items()) + f", {epoch} epochs" * (epoch > 0)
        print(f"{name} {text}: NDCG@10 on validation {value:.4f}, {time.monotonic() - began:.0f} s", file=sys.stderr)
        if value > best:
            best, words, ranks = value, text, test.ranks(model, half_life, RANKED)
    return words, pd.DataFrame({"user": store.raw_ids(USER_FEATURE)[test.users], "rank": ranks})


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a store of preprocess_dataset.py")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="only these")
    parser.add_argument("--seed", type=int, default=1, help="of initial weights, dropout and the order of users")
    parser.add_argument("--trials", type=int, nargs="+", default=(), choices=range(4), help="only these of a method's")
    parser.add_argument("--train_fraction", type=float, help="cut in time, after this share of the events")
    parser.add_argument("--output", type=Path, help="also write the mean metrics of the last method here, as JSON")
    parser.add_argument("--per_user", type=Path, help="also write each user's rank of the last method here, as CSV")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    store, began = SequenceStore.open(options.store), time.monotonic()
    cut = {"split": "time", "train_fraction": options.train_fraction} if options.train_fraction else {}
    print(f"| method | {' | '.join(METRICS)} | settings |\n|{'---|' * (len(METRICS) + 2)}")
    for name in options.peers:
        words, ranks = measure(store, name, options.seed, options.trials, cut)
        metrics = retrieval_metrics(METRICS, ranks["rank"].to_numpy())
        print(f"| {name} | {' | '.join(number(metrics[metric]) for metric in METRICS)} | {words} |", flush=True)
        if options.per_user:
            ranks.to_csv(options.per_user, index=False)
        if options.output:
            options.output.write_text(json.dumps({"metrics": metrics, "seconds": time.monotonic() - began}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
