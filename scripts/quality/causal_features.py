"""Numbers of each rating, made from the other training users and from the user's earlier ratings.

    python scripts/quality/causal_features.py --store tmp_data/ml-1m --seed 1 --output tmp_data/ml-1m-seed1

reads a sequence store with ratings and times, and makes another one whose events have these numbers as features. The
Parquet tables from which it is made stay in OUTPUT.tables. The seed and the fraction of training users must be those of
the run, because the split of the users depends on them.

What is learnt of items counts ratings of other training users at any time, also later ones, which a service would
not have. No number of a rating depends on this rating, on later ones of the user, or on the ratings of held-out users
(``ratings.py``). Everything is held in memory: about 1 kB per rating, and 30 bytes per pair of items.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.base.errors import EXIT_DONE
from hstu.config.cli import tool
from hstu.data.batches.jagged import ranges, run_starts
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from scripts.quality import factor_model, neighbours
from scripts.quality.ratings import Ratings, sums_before

Columns = dict[str, np.ndarray]
"""Name → one number per rating; NaN where it is missing."""

_PRIOR = 3.0
"""Means of a user's ratings are shrunk as if there were so many more, at the mean of all."""
_ITEM_PRIOR = 5.0
"""The same for the means of items."""
_DECAYS = (0.7, 0.9, 0.97)
"""What each further rating leaves of the weight of the earlier ones, in recency-weighted means."""
_LAST = 3
_SESSION_GAP_S = 3600
_FACTORS, _MEMORY = 12, 0.998


def causal_features(store: SequenceStore, ratings: Ratings, log: Callable[[str], None] = lambda text: None) -> Columns:
    """All numbers of each rating, in the order of the store."""
    log("features of items and users")
    columns = _of_items(ratings)
    columns |= _of_users(ratings, columns["item_mean"]) | _of_times(ratings)
    columns |= _of_item_features(store, ratings, columns["item_mean"])
    for fold, (others, users) in enumerate(ratings.folds()):
        log(f"neighbours and factors, users {fold + 1} of {ratings.held_out + 1}")
        events = ratings.events_of(users)
        for name, values in _from_others(ratings, others, users).items():
            columns.setdefault(name, np.full(len(ratings), np.nan))[events] = values
    return columns | _surprises(ratings, columns["factor_prediction"])


def _item_counts(ratings: Ratings, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ratings [I], their sums [I]) of some users."""
    events = ratings.events_of(users)
    counts = np.bincount(ratings.item[events], minlength=ratings.num_items)
    return counts, np.bincount(ratings.item[events], ratings.rating[events], minlength=ratings.num_items)


def item_means(ratings: Ratings, users: np.ndarray) -> np.ndarray:
    """Shrunk mean rating of each item by some users, float64 [I]."""
    counts, sums = _item_counts(ratings, users)
    centre = sums.sum() / counts.sum()
    return np.asarray((sums + _ITEM_PRIOR * centre) / (counts + _ITEM_PRIOR))


def _of_others(ratings: Ratings, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
    """A statistic of all ratings of the other training users, for each rating; float64 [E]."""
    found = np.zeros(len(ratings))
    for others, users in ratings.folds():
        found[ratings.events_of(users)] = statistic(ratings.rating[ratings.events_of(others)])
    return found


def _of_items(ratings: Ratings) -> Columns:
    """Mean, deviation, popularity and shares of the ratings, by other training users."""
    stars = np.unique(ratings.rating)
    names = ["item_mean", "item_std", "item_popularity", *(f"item_share_{star:g}" for star in stars)]
    columns = {name: np.zeros(len(ratings)) for name in names}
    for others, users in ratings.folds():
        events = ratings.events_of(users)
        item = ratings.item[events]
        means = item_means(ratings, others)
        counts, _ = _item_counts(ratings, others)
        theirs = ratings.events_of(others)
        squares = (ratings.rating[theirs] - means[ratings.item[theirs]]) ** 2
        spread = np.bincount(ratings.item[theirs], squares, minlength=ratings.num_items) + _ITEM_PRIOR * squares.mean()
        columns["item_mean"][events] = means[item]
        columns["item_std"][events] = np.sqrt(spread / (counts + _ITEM_PRIOR))[item]
        columns["item_popularity"][events] = np.log1p(counts / len(others))[item]
        for star in stars:
            is_star = ratings.rating[theirs] == star
            share = (
                np.bincount(ratings.item[theirs], is_star, minlength=ratings.num_items) + _ITEM_PRIOR * is_star.mean()
            )
            columns[f"item_share_{star:g}"][events] = (share / (counts + _ITEM_PRIOR))[item]
    return columns


def _of_users(ratings: Ratings, expected: np.ndarray) -> Columns:
    """Running statistics of the user's earlier ratings, as they are and above the means of their items.

    expected: mean of the rated item, float64 [E].
    """
    rating, count = ratings.rating, ratings.place
    above = rating - expected
    centre = _of_others(ratings, np.mean)
    columns: Columns = {"user_count": np.log1p(count)}
    columns["user_mean"] = (sums_before(rating, ratings.user) + _PRIOR * centre) / (count + _PRIOR)
    columns["user_offset"] = sums_before(above, ratings.user) / (count + _PRIOR)
    spread = sums_before((rating - columns["user_mean"]) ** 2, ratings.user)
    columns["user_std"] = np.sqrt((spread + _PRIOR * _of_others(ratings, np.var)) / (count + _PRIOR))
    columns["user_choice"] = sums_before(expected - centre, ratings.user) / (count + _PRIOR)
    for star in np.unique(rating):
        is_star = (rating == star).astype(np.float64)
        of_others = _of_others(ratings, partial(_share, star))
        columns[f"user_share_{star:g}"] = (sums_before(is_star, ratings.user) + _PRIOR * of_others) / (count + _PRIOR)
    for back in range(1, _LAST + 1):
        before = np.maximum(np.arange(len(ratings)) - back, 0)
        columns[f"last_rating_{back}"] = np.where(count >= back, rating[before], np.nan)
        columns[f"last_above_{back}"] = np.where(count >= back, above[before], np.nan)
    for decay in _DECAYS:
        columns[f"recent_offset_{decay:g}"] = _recent_mean(above, ratings, decay)
    columns["baseline"] = expected + columns["user_offset"]
    columns["recent_baseline"] = expected + columns[f"recent_offset_{_DECAYS[1]:g}"]
    return columns


def _share(star: float, values: np.ndarray) -> float:
    return float(np.mean(values == star))


def _recent_mean(values: np.ndarray, ratings: Ratings, decay: float) -> np.ndarray:
    """Mean over the user's earlier ratings, weighted by decay^(ratings since), shrunk towards 0; float64 [E]."""
    found = np.zeros(len(ratings))
    users = np.arange(len(ratings.lengths))
    total, weight = np.zeros(len(users)), np.zeros(len(users))
    for rows, events in ratings.steps(users):
        found[events] = total[rows] / (weight[rows] + 1)
        total[rows] = decay * total[rows] + values[events]
        weight[rows] = decay * weight[rows] + 1
    return found


def _of_times(ratings: Ratings) -> Columns:
    """When the rating is made: hour, weekday, time since the one before, place in the session and in its second."""
    gap = np.where(ratings.place > 0, np.diff(ratings.time, prepend=ratings.time[:1]), 0)
    index = np.arange(len(ratings))

    def since(is_first: np.ndarray) -> np.ndarray:
        return np.asarray(index - np.maximum.accumulate(np.where(is_first, index, 0)))

    is_first = ratings.place == 0
    first_time = ratings.time[ratings.offsets[:-1]][ratings.user]
    return {
        "hour": (ratings.time // 3600 % 24).astype(np.float64),
        "weekday": ((ratings.time // 86400 + 4) % 7).astype(np.float64),
        "gap": np.where(is_first, np.nan, np.log1p(gap)),
        "days_since_first": np.log1p((ratings.time - first_time) / 86400),
        "in_session": np.log1p(since(is_first | (gap > _SESSION_GAP_S))),
        "in_second": np.log1p(since(is_first | (gap > 0))),
    }


def _of_item_features(store: SequenceStore, ratings: Ratings, expected: np.ndarray) -> Columns:
    """Of each feature of items: how the user rated items with the same values before; and numbers such as years."""
    columns: Columns = {}
    above = ratings.rating - expected
    for name in store.item_side_features:
        codes, offsets = store.item_values(name)
        if offsets is None:
            number = np.array([_as_number(text) for text in store.raw_ids(name)])[codes]
            if not np.isnan(number).all():
                columns[f"{name}_number"] = number[ratings.item]
            offsets = np.arange(len(codes) + 1)
        lengths = np.diff(offsets)[ratings.item]
        event = np.repeat(np.arange(len(ratings)), lengths)
        value = codes[ranges(offsets[ratings.item], lengths)].astype(np.int64)
        pair = ratings.user[event] * store.cardinality(name) + value
        count = sums_before(np.ones(len(pair)), pair)
        offset = sums_before(above[event], pair) / (count + _PRIOR)
        starts = run_starts(lengths)
        columns[f"{name}_offset"] = np.add.reduceat(offset, starts) / lengths
        columns[f"{name}_count"] = np.log1p(np.add.reduceat(count, starts) / lengths)
        if lengths.max() > 1:
            columns[f"{name}_least"] = np.minimum.reduceat(offset, starts)
            columns[f"{name}_most"] = np.maximum.reduceat(offset, starts)
    return columns


def _as_number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return np.nan


def _from_others(ratings: Ratings, others: np.ndarray, users: np.ndarray) -> Columns:
    """Predictions of the ratings of ``users`` by neighbours and factors that are estimated from ``others``."""
    means = item_means(ratings, others)
    expected = means[ratings.item[ratings.events_of(users)]]
    columns = neighbours.predict_online(neighbours.fit(ratings, others, means), ratings, users, means)
    columns["knn"] += expected
    model = factor_model.fit(ratings, others, _FACTORS)
    found = factor_model.predict_online(model, ratings, users, _MEMORY)
    still = factor_model.predict_online(model, ratings, users)
    columns["factor_prediction"], columns["factor_deviation"] = found.prediction, found.deviation
    columns["factor_prediction_still"] = still.prediction
    return columns


def _surprises(ratings: Ratings, prediction: np.ndarray) -> Columns:
    """How far the user's earlier ratings were from their predictions: running means, and of their squares."""
    error = ratings.rating - prediction
    columns = {f"surprise_{decay:g}": _recent_mean(error, ratings, decay) for decay in _DECAYS}
    columns["last_surprise"] = np.where(ratings.place > 0, np.roll(error, 1), np.nan)
    squares = sums_before(error**2, ratings.user)
    columns["user_error"] = np.sqrt((squares + _PRIOR * 0.8) / (ratings.place + _PRIOR))
    return columns


def write_tables(store: SequenceStore, columns: Columns, folder: Path) -> InteractionColumns:
    """Write events.parquet, users.parquet and items.parquet, in raw ids and in the order of the store.

    Returns what their columns mean.
    """
    assert store.action_feature and store.timestamp_feature
    folder.mkdir(parents=True, exist_ok=True)
    item, action, time = store.item_feature, store.action_feature, store.timestamp_feature
    numbers = tuple(columns)
    context = tuple(name for name in store.contextual_features if name != USER_FEATURE)
    lengths = np.diff(store.offsets())
    events: dict[str, Any] = {
        "user": np.repeat(store.raw_ids(USER_FEATURE), lengths),
        item: store.raw_ids(item)[store.sequence(item)],
        action: np.asarray(store.sequence(action)),
        time: np.asarray(store.sequence(time)),
    }
    events |= {name: pa.array(columns[name].astype(np.float32), from_pandas=True) for name in numbers}
    users = {name: store.raw_ids(name)[store.context(name)] for name in context}
    items: dict[str, Any] = {item: store.raw_ids(item)}
    for name in store.item_side_features:
        codes, offsets = store.item_values(name)
        values = pa.array(store.raw_ids(name)[codes])
        items[name] = values if offsets is None else pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    for name, table in (
        ("events", events),
        ("users", {"user": store.raw_ids(USER_FEATURE), **users}),
        ("items", items),
    ):
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return InteractionColumns(
        interactions=folder / "events.parquet",
        user="user",
        item=item,
        action=action,
        time=time,
        context=folder / "users.parquet" if context else None,
        context_columns=context,
        items=folder / "items.parquet" if store.item_side_features else None,
        item_columns=tuple(store.item_side_features),
        event_columns=numbers,
        numbers=numbers,
    )


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a sequence store with ratings and times")
    parser.add_argument("--output", type=Path, required=True, help="the store to make, with these numbers")
    parser.add_argument("--seed", type=int, required=True, help="TrainerArgs.seed of the run")
    parser.add_argument("--train_fraction", type=float, default=0.7, help="DatasetArgs.train_fraction of the run")
    parser.add_argument("--folds", type=int, default=5, help="of training users")
    parser.add_argument("--force", action="store_true", help="replace an existing store")
    options = parser.parse_args(arguments)
    store = SequenceStore.open(options.store)
    ratings = Ratings.of(store, options.seed, options.train_fraction, options.folds)
    columns = causal_features(store, ratings, log=lambda text: print(text, flush=True))
    tables = options.output.with_name(f"{options.output.name}.tables")
    described = write_tables(store, columns, tables)
    import_interactions(options.output.name, described, output=options.output, force=options.force)
    print(f"{options.output}: {len(ratings):,} ratings with {len(columns)} numbers each")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
