"""The tables of the quality campaign, which scripts/quality/run.py runs: what their rows train, and how they choose.

To add a recipe, write its gin file into configs/ and name it in a table or a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hstu.base.errors import ConfigError
from hstu.config.args import Task
from hstu.config.problems import did_you_mean
from scripts.quality.ratings import PARTS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a configuration that is trained, or a peer.

    In bindings and peers, $seed, $store (the preprocessed data) and $folder (the row's own, for one seed) stand for
    what they are in a run.
    """

    name: str
    config: str | None = None
    """Gin file. None: that of the table."""
    bindings: tuple[str, ...] = ()
    """Changes of the gin file; they win over those of the table."""
    epochs_of: str | None = None
    """Train as this row of the table does, on its validation part, too, for as many epochs as it needed to its best
    validation. The row's own bindings come on top."""
    peer: tuple[str, ...] = ()
    """Instead of a training: a script and its arguments. It writes {"metrics": {name: value}} to $folder/peer.json, and
    it may write $folder/per_user.csv with columns user and rank, or for ranking user and influence (ratings.py)."""
    trials: int | str = ""
    """Number of settings that validation compared to choose those of the row, where they were counted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that are compared on the same data by the same metrics."""

    title: str
    task: Task
    dataset: str
    """Name of a built-in dataset."""
    running_statistics: bool = False
    """Whether its events have them."""
    config: str
    """Gin file of the rows that have none of their own."""
    metrics: tuple[str, ...]
    """Columns. The best value of the first one on validation chooses the checkpoint."""
    rows: tuple[Row, ...]
    reference: str
    """The row that the others are compared with, seed by seed."""
    bindings: tuple[str, ...] = ()
    """For all rows."""
    validation: tuple[str, ...]
    """Bindings that hold out a validation part."""
    whole: tuple[str, ...] = ()
    """Bindings that train on the validation part, too, for rows with ``epochs_of``."""
    published: tuple[tuple[str, float, float], ...] = ()
    """Figures of papers on the same data: whose, and the values of the first two metrics."""

    @property
    def store(self) -> str:
        """Name of the directory of the preprocessed data."""
        return self.dataset + "-running" * self.running_statistics

    @property
    def metric(self) -> str:
        """The metric that chooses."""
        return self.metrics[0]

    def row(self, name: str) -> Row:
        """The row of this name. Raises ConfigError if there is none."""
        return find("row", name, {row.name: row for row in self.rows})

    def config_of(self, row: Row) -> str:
        """The gin file of a row."""
        inherited = self.config_of(self.row(row.epochs_of)) if row.epochs_of else self.config
        return row.config or inherited

    def bindings_of(self, row: Row) -> tuple[str, ...]:
        """All bindings of a row on top of its gin file."""
        if row.epochs_of:
            return (*self.bindings_of(self.row(row.epochs_of)), *self.whole, *row.bindings)
        return (*self.bindings, *self.validation, *row.bindings)

    def chooses(self, row: Row) -> bool:
        """Whether validation chooses the checkpoint of a row."""
        return row.epochs_of is None and not row.peer


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The one of this name. Raises ConfigError with those that there are."""
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}{did_you_mean(name, known)}; choose from: {', '.join(known)}")
    return known[name]


def without_each(undone: Mapping[str, Sequence[str]], trials: int | str = "") -> tuple[Row, ...]:
    """The row "all", which is the gin file of the table, and for each part of its recipe the file without it.

    ``undone``: part → the bindings that take it away. ``trials``: of the recipe.
    """
    parts = (Row(name=f"without {part}", bindings=tuple(undo)) for part, undo in undone.items())
    return (Row(name="all", trials=trials), *parts)


_RETRIEVAL = {
    "mask_seen": ("RetrievalArgs.mask_seen = False",),
    "all items as negatives": ('RetrievalArgs.negatives = "uniform"', "RetrievalArgs.num_negatives = 128"),
    "small batches and a schedule": (
        "TrainerArgs.train_batch_size = 128",
        "TrainerArgs.eval_interval = 94",
        "OptimizerArgs.learning_rate = 1e-3",
        'LRScheduleArgs.schedule = "constant"',
        "LRScheduleArgs.warmup_ratio = None",
    ),
    "genres and year": ("DatasetArgs.side_feature_names = []", "RetrievalArgs.item_tower = False"),
    "item tower": ("RetrievalArgs.item_tower = False",),
    "ratings": ('DatasetArgs.action_feature_name = ""', "NetworkArgs.interleave_actions = True"),
    "random windows": ("DatasetArgs.window_stride = None",),
    "four layers": ("NetworkArgs.num_layers = 2",),
    "the time of the request": ('DatasetArgs.query_time = "last_event"',),
    "the time of the request in half of the sequences": ('DatasetArgs.query_time = "either"',),
    "learned positions": ('NetworkArgs.position_encoding = "relative_bias"',),
}
_ONLY_ML_1M = "learned positions", "random windows"
"""Parts that the recipe of ML-100K does not have."""
_ONLY_ML_100K = "small batches and a schedule", "genres and year", "four layers"
"""Parts that the table of ML-1M does not take away."""
_ESASREC = "in arXiv 2508.06450"
_BEAUTY = (
    ("SASRec (in arXiv 2305.05065)", 0.0318, 0.0605),
    ("S3-Rec, with attributes (in arXiv 2305.05065)", 0.0327, 0.0647),
    ("TIGER (arXiv 2305.05065)", 0.0384, 0.0648),
    ("ActionPiece (arXiv 2502.13581)", 0.0424, 0.0775),
    ("DuoRec (arXiv 2110.05730)", 0.0443, 0.0845),
    (f"HSTU ({_ESASREC})", 0.0439, 0.0788),
    (f"FuXi-α ({_ESASREC})", 0.0451, 0.0809),
    (f"SASRec with sampled softmax ({_ESASREC})", 0.0531, 0.0921),
    (f"eSASRec ({_ESASREC})", 0.0523, 0.0928),
)
_TOYS = (
    ("TIGER (arXiv 2305.05065)", 0.0432, 0.0712),
    (f"HSTU ({_ESASREC})", 0.0450, 0.0778),
    (f"SASRec with sampled softmax ({_ESASREC})", 0.0580, 0.0970),
    (f"eSASRec ({_ESASREC})", 0.0538, 0.0939),
)
"""Figures of papers: whose, NDCG@10 and HR@10."""


def _peer(name: str, trials: int = 4, *, only: int | None = None) -> Row:
    """A method of retrieval_peers.py. ``only``: the one of its trials that validation chose on ML-100K."""
    chosen = () if only is None else ("--trials", str(only))
    peer = ("scripts/quality/retrieval_peers.py", "--store", "$store", "--peers", name, "--seed", "$seed", *chosen,
            "--output", "$folder/peer.json", "--per_user", "$folder/per_user.csv")  # fmt: skip
    return Row(name=name, peer=peer, trials=1 if chosen else trials)


_MEMORIES = (_peer("popularity", 1), *map(_peer, ("item_knn", "item_knn_recent", "ease", "ease_recent")))
_NETWORKS = tuple(map(_peer, ("gru4rec", "bert4rec", "sasrec", "esasrec")))
"""Methods without and with a network; papers have trained the latter on Amazon's data."""
_NO_NUMBERS = (
    "TrainerArgs.train_batch_size = 8",
    "TrainerArgs.eval_interval = 100",
    "DatasetArgs.window_stride = 200",
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.num_attention_heads = 2",
    "NetworkArgs.hidden_dropout = 0.3",
    "NetworkArgs.input_dropout = 0.0",
    "NetworkArgs.item_embedding_dim = 16",
    "OptimizerArgs.learning_rate = 1.5e-3",
    "OptimizerArgs.ema_decay = 0.995",
    "TrainerArgs.num_train_epochs = 3.0",
)
"""The recipe without its numbers, on top of the gin file of ids and ratings."""


def _retrieval(title: str, dataset: str, config: str, rows: tuple[Row, ...], epochs: int) -> Table:
    return Table(
        title=title, task="retrieval", dataset=dataset, config=config, rows=rows, reference="all",
        metrics=("NDCG@10", "HR@10", "HR@50", "MRR", "NDCG@10/last_event", "HR@10/last_event"),
        bindings=(
            'RetrievalArgs.eval_metrics = ("NDCG@10", "HR@10", "HR@50", "MRR")',
            f"TrainerArgs.num_train_epochs = {epochs}.0",
        ),
        validation=("DatasetArgs.valid_items = 1",),
        whole=("DatasetArgs.valid_items = 0",),
    )  # fmt: skip


def _later(table: Table) -> Table:
    """Train before a moment T, evaluate after it: the recipe, and what it reads of times."""
    rows = (row for row in table.rows if row.name == "all" or "time" in row.name)
    return replace(
        table, title=f"{table.title}, cut in time", rows=tuple(rows),
        metrics=("NDCG@10", "HR@10", "NDCG@10/last_event", "HR@10/last_event", "HR@10/new_users", "HR@10/new_items"),
        bindings=(*table.bindings, 'DatasetArgs.split = "time"', "DatasetArgs.train_fraction = 0.8"),
    )  # fmt: skip


def _amazon(title: str, dataset: str, published: tuple[tuple[str, float, float], ...]) -> Table:
    """Data in the order of time, without times."""
    attributes = 'DatasetArgs.side_feature_names = ["attributes"]', "RetrievalArgs.item_tower = True"
    return Table(
        title=title, task="retrieval", dataset=dataset, config=f"configs/{dataset.replace('-', '_')}_retrieval.gin",
        metrics=("NDCG@10", "HR@10", "MRR"), reference="ids alone", published=published,
        rows=(
            Row(name="ids alone"), Row(name="with attributes", bindings=attributes),
            Row(name="ids alone, trained on validation items, too", epochs_of="ids alone"), *_MEMORIES,
        ),
        validation=("DatasetArgs.valid_items = 1",),
        whole=("DatasetArgs.valid_items = 0",),
    )  # fmt: skip


def _rating_peer(name: str, method: str, trials: int | str = "", **settings: float) -> Row:
    peer = ("scripts/quality/ranking_peers.py", "--store", "$store", "--seed", "$seed", "--method", method, "--output",
            "$folder/peer.json", "--per_user", "$folder/per_user.csv")  # fmt: skip
    return Row(name=name, peer=(*peer, *(("--settings", json.dumps(settings)) if settings else ())), trials=trials)


def _trees(library: str, trials: int, **settings: float) -> Row:
    """``settings``: the best of ``trials`` on the validation users of seed 1."""
    return _rating_peer(library, library.lower(), trials, **settings)


def _ranking(title: str, dataset: str, trials: int, trees: Sequence[Row]) -> Table:
    """``trials``: of the gin file."""
    name = dataset.replace("-", "_")
    return Table(
        title=title, task="ranking", dataset=dataset, running_statistics=True, reference="all",
        config=f"configs/{name}_ranking_numbers.gin",
        rows=(
            Row(name="all", trials=trials),
            Row(name="no numbers", config=f"configs/{name}_ranking.gin", bindings=_NO_NUMBERS),
            _rating_peer("item mean", "item_mean"),
            _rating_peer("item mean + running user mean", "baseline"),
            _rating_peer("online factor model", "prediction"),
            *trees,
        ),
        metrics=("AUC>=4", "LOGLOSS", *(f"AUC>=4, {part}" for part in PARTS)),
        bindings=('RankingArgs.eval_metrics = ("AUC>=4", "LOGLOSS", "ACC")',),
        validation=("DatasetArgs.train_fraction = 0.6", "DatasetArgs.valid_fraction = 0.1"),  # 30 % are test, as usual
    )  # fmt: skip


_ML_1M = _retrieval(
    "Next film, MovieLens-1M", "ml-1m", "configs/ml_1m_retrieval_best.gin",
    (
        *without_each({part: undo for part, undo in _RETRIEVAL.items() if part not in _ONLY_ML_100K}),
        *_MEMORIES, _peer("sasrec", only=1), _peer("esasrec", only=1),
    ), epochs=40,
)  # fmt: skip
_ML_100K = _retrieval(
    "Next film, MovieLens-100K", "ml-100k", "configs/ml_100k_retrieval.gin",
    (
        *without_each({part: undo for part, undo in _RETRIEVAL.items() if part not in _ONLY_ML_1M}, "14 or more"),
        Row(name="with random windows", bindings=('DatasetArgs.window_stride = "random"',)),
        Row(name="all, trained on validation items, too", epochs_of="all"),
        *_MEMORIES, *_NETWORKS,
    ), epochs=24,
)  # fmt: skip
TABLES: Mapping[str, Table] = {
    "ml_1m_retrieval": _ML_1M,
    "ml_1m_retrieval_time": _later(_ML_1M),
    "ml_100k_retrieval": _ML_100K,
    "ml_100k_retrieval_time": _later(_ML_100K),
    "amazon_beauty_retrieval": _amazon("Next product, Amazon Beauty", "amazon-beauty", _BEAUTY),
    "amazon_toys_retrieval": _amazon("Next product, Amazon Toys", "amazon-toys", _TOYS),
    "ml_1m_ranking": _ranking(
        "Ratings, MovieLens-1M", "ml-1m",
        trials=2,
        trees=(
            _trees("LightGBM", 7, learning_rate=0.05, num_leaves=31, min_data_in_leaf=500, feature_fraction=1.0,
                   bagging_fraction=0.7, lambda_l2=10.0),
        ),
    ),
    "ml_100k_ranking": _ranking(
        "Ratings, MovieLens-100K", "ml-100k",
        trials=4,
        trees=(
            _trees("LightGBM", 12, learning_rate=0.1, num_leaves=31, min_data_in_leaf=500, feature_fraction=0.6,
                   bagging_fraction=1.0, lambda_l2=0.0),
            _trees("CatBoost", 12, learning_rate=0.1, depth=7, rsm=0.3, subsample=0.9, l2_leaf_reg=10.0,
                   random_strength=0.0),
        ),
    ),
}  # fmt: skip
