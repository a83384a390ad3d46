"""Vectors of items from the training part of a run's data, for its EmbeddingArgs.initial_rows.

    python scripts/factorize.py --gin-config-file my_ranking.gin --output items.parquet

Give the gin files and bindings of the run. The vectors are made of the events that it trains on; those of held-out
users, and held-out events and targets, are not read. Items without such events are left out.
Ratings (ranking by classes of the action): the first column is the mean rating of an item, the others are its factors
in a matrix factorisation of the ratings by alternating least squares. Other data: a truncated SVD of the matrix that
says which user has events of which item, with rows of equal length.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.base.errors import EXIT_DONE, ConfigError, UserError
from hstu.base.files import written_aside
from hstu.config.args import DatasetArgs, RankingArgs
from hstu.config.gin_io import read_and_check
from hstu.config.rules import RULES
from hstu.config.run_config import RunConfig, Task
from hstu.config.tool import tool
from hstu.data.features.initial_rows import ID, VECTOR
from hstu.data.features.roles import resolve_roles
from hstu.data.features.training_statistics import trained_events
from hstu.data.rules import DATA_RULES
from hstu.data.sampling.samples import build_samples, check_requests, check_split
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.store_source import open_store

try:
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import svds
except ImportError:
    csr_matrix = None

COLUMNS = 16
"""Of the vectors, or as many as the table has if those are fewer."""
STD = 0.02
"""EmbeddingArgs.init_std by default."""
SWEEPS = 15
SHRINKAGE = 5.0
"""How many average ratings are added to those of each item and user before their means are taken."""
RIDGE = 5.0
_BLOCK = 8192
"""Users or items that are solved for at a time, each with a matrix of factors × factors."""


@dataclass(frozen=True)
class Events:
    """The events that a run trains on; [n] each."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None
    shape: tuple[int, int]
    """Users and items of the data."""

    def matrix(self, values: np.ndarray) -> Any:
        """Values of the events as a sparse matrix [users, items]; those of one user and item are added up."""
        return csr_matrix((values, (self.user, self.item)), shape=self.shape)


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if csr_matrix is None:
        raise UserError("the package scipy is missing: pip install 'hstu[factorize]', or pip install scipy")
    config = read(options)
    store = open_store(config.dataset)  # type: ignore[arg-type]
    events = training_events(config, store, has_ratings(config) if options.kind is None else options.kind == "ratings")
    columns = number_of_columns(options.columns, config, events)
    vectors = options.std * (
        event_vectors(events, columns) if events.rating is None else rating_vectors(events, columns)
    )
    items = np.unique(events.item)
    write(options.output, store.raw_ids(store.item_feature)[items], vectors[items])
    kind = "events" if events.rating is None else "ratings"
    print(
        f"{options.output}: vectors of {columns} numbers for {len(items):,} of {events.shape[1]:,} items, from "
        f"{len(events.item):,} training {kind} of {len(np.unique(events.user)):,} users"
    )
    print(f'EmbeddingArgs.initial_rows = "{options.output}"  # of the table of {store.item_feature}')
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gin-config-file", dest="files", action="extend", nargs="+", default=[], metavar="FILE", help="of the run")
    add("--gin-bindings", dest="bindings", action="extend", nargs="+", default=[], metavar="BINDING", help="of the run")
    add("--output", type=Path, required=True, help="Parquet file to write")
    add("--task", choices=("ranking", "retrieval"), help="of the run, if its files do not show it")
    add("--kind", choices=("ratings", "events"), help="what to factorise (default: ratings if the run predicts them)")
    add("--columns", type=int, help=f"numbers of a vector (default: {COLUMNS}, at most the width of the table)")
    add("--std", type=float, default=STD, help=f"their standard deviation, which is that of random rows ({STD})")
    return parser


def read(options: argparse.Namespace) -> RunConfig:
    """The checked configuration of the run."""
    texts = [Path(file).read_text(encoding="utf-8") for file in options.files if Path(file).is_file()]
    is_retrieval = any("RetrievalArgs." in text for text in [*texts, *options.bindings])
    task: Task = options.task or ("retrieval" if is_retrieval else "ranking")
    config, _ = read_and_check(options.files, options.bindings, task, 1, (*RULES, *DATA_RULES))
    if not isinstance(config.dataset, DatasetArgs):
        raise ConfigError("the run trains on random data, which has nothing to factorise; name one with DatasetArgs")
    if not options.std > 0:
        raise ConfigError(f"--std {options.std}: expected a number above 0")
    return config


def has_ratings(config: RunConfig) -> bool:
    """Whether the run predicts classes of the action, which are in order, as those of stars are."""
    args = config.task_args
    return isinstance(args, RankingArgs) and args.tasks is None and args.prediction_head_arch[-1] > args.num_tasks


def training_events(config: RunConfig, store: SequenceStore, with_ratings: bool) -> Events:
    """All events before what is held out, of the users to train on; also those that are too old for the model."""
    args = config.dataset
    assert isinstance(args, DatasetArgs)
    check_split(store, args, config.located)
    check_requests(store, args, config.located)
    roles = resolve_roles(store, args, config.located)
    if with_ratings and roles.action is None:
        raise ConfigError(f"{store.path} has no action, and so no ratings; use --kind events")
    samples = build_samples(store, args, config.task, "train", config.trainer.seed)
    events = np.flatnonzero(trained_events(samples, store.num_events))
    if not len(events):
        raise ConfigError(f"the run has no training events in {store.path}; check its split")
    ratings = store.sequence(str(roles.action))[events].astype(np.float64) if with_ratings else None
    users = np.searchsorted(store.offsets(), events, side="right") - 1
    return Events(users, store.sequence(roles.item)[events], ratings, (store.num_users, store.cardinality(roles.item)))


def number_of_columns(wanted: int | None, config: RunConfig, events: Events) -> int:
    """How many numbers a vector has. Raises ConfigError for more than the table or the data have room for."""
    width, most = config.network.item_width, min(map(len, map(np.unique, (events.user, events.item)))) - 1
    columns = min(COLUMNS, width, most) if wanted is None else wanted
    if not 2 <= columns <= min(width, most):
        raise ConfigError(
            f"--columns {columns}: expected 2 to {min(width, most)}; the rows of the item table have {width} numbers, "
            f"and the training data has {most + 1} users or items"
        )
    return columns


def rating_vectors(events: Events, columns: int) -> np.ndarray:
    """[items, columns]: offset from the mean rating, and factors, the strongest first. Both have mean square 1."""
    assert events.rating is not None
    rest = events.rating - events.rating.mean()
    of_items = _shrunk_means(rest, events.item, events.shape[1])
    rest = rest - of_items[events.item]
    rest = rest - _shrunk_means(rest, events.user, events.shape[0])[events.user]
    factors = factorise(events.matrix(rest), events.matrix(np.ones_like(rest)), columns - 1)
    has_events = np.bincount(events.item, minlength=events.shape[1]) > 0
    parts = [of_items[:, None], factors]
    return np.concatenate([part / max(np.sqrt(np.square(part[has_events]).mean()), 1e-12) for part in parts], axis=1)


def _shrunk_means(values: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
    sums = np.bincount(groups, weights=values, minlength=number)
    return sums / (np.bincount(groups, minlength=number) + SHRINKAGE)


def factorise(values: Any, known: Any, factors: int) -> np.ndarray:
    """Item factors [items, factors] of sparse matrices [users, items], by ridge regressions of one side on the other.

    ``known``: how many values were added up in each of ``values``. The factors of users are uncorrelated and of equal
    size, so the columns are the directions in which users differ, the one that explains most first.
    """
    item = np.random.default_rng(0).normal(0, 0.1, (values.shape[1], factors))
    values_of_items, known_of_items = values.T.tocsr(), known.T.tocsr()
    for _ in range(SWEEPS):
        user = _solve(values, known, item)
        item = _solve(values_of_items, known_of_items, user)
    size, turn = np.linalg.eigh(user.T @ user / len(user))
    scaled = item @ (turn * np.sqrt(np.maximum(size, 0)))
    return _with_signs(scaled @ np.linalg.svd(scaled, full_matrices=False)[2].T)


def _solve(values: Any, known: Any, other: np.ndarray) -> np.ndarray:
    """The factors of the rows that predict their values best, given those of the columns."""
    width = other.shape[1]
    products = (other[:, :, None] * other[:, None, :]).reshape(len(other), -1)
    found = np.empty((values.shape[0], width))
    for start in range(0, len(found), _BLOCK):
        rows = slice(start, start + _BLOCK)
        squares = (known[rows] @ products).reshape(-1, width, width) + RIDGE * np.eye(width)
        found[rows] = np.linalg.solve(squares, (values[rows] @ other)[:, :, None])[:, :, 0]
    return found


def event_vectors(events: Events, columns: int) -> np.ndarray:
    """[items, columns]: singular vectors, in proportion to their singular values; each row has mean square 1."""
    seen = events.matrix(np.ones(len(events.item))).sign()
    scales = [diags(1 / np.sqrt(np.maximum(np.asarray(seen.sum(axis)).ravel(), 1))) for axis in (1, 0)]
    _, size, vectors = svds(scales[0] @ seen @ scales[1], k=columns, v0=np.ones(min(seen.shape)))
    rows = _with_signs((vectors * size[:, None]).T[:, ::-1])
    return rows / np.maximum(np.sqrt(np.square(rows).mean(1, keepdims=True)), 1e-12)


def _with_signs(columns: np.ndarray) -> np.ndarray:
    """The same columns, the entry of each that is farthest from 0 positive: the sign is otherwise arbitrary."""
    largest = columns[np.abs(columns).argmax(0), np.arange(columns.shape[1])]
    return columns * np.where(largest < 0, -1.0, 1.0)


def write(path: Path, ids: np.ndarray, vectors: np.ndarray) -> None:
    """Write the file as a whole or not at all."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({ID: pa.array(ids), VECTOR: pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
    with written_aside(path) as aside:
        pq.write_table(table, aside)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
