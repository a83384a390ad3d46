"""Write random ratings in MovieLens 20M's file, at any size: what preprocessing is measured on.

python scripts/bench/generate_movielens.py --output DIR [--rows 20000263 --users 138493 --movies 26744]

Users in order, as in the real file, their ratings in no order of time; log-normal lengths of at least 20, Zipf
movies, ratings in halves, ties in time. Repeatable: the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from tqdm import tqdm

_LEAST = 20
_ROWS_PER_CHUNK = 1 << 20
_ZIPF = 1.1
_FIRST, _LAST = 790_000_000, 1_427_000_000


def lengths(random: np.random.Generator, users: int, rows: int) -> np.ndarray:
    """Ratings of each user, int64 [users], that add up to ``rows``."""
    weights = random.lognormal(0, 1.2, users)
    counts = _LEAST + np.floor(weights / weights.sum() * (rows - _LEAST * users)).astype(np.int64)
    counts[: rows - counts.sum()] += 1
    return counts


def chunk(random: np.random.Generator, user: np.ndarray, movies: int) -> pa.Table:
    """Ratings of ``user`` [n]."""
    size = len(user)
    ranks = ((movies ** (1 - _ZIPF) - 1) * random.random(size) + 1) ** (1 / (1 - _ZIPF)) - 1
    movie = 1 + (np.minimum(ranks.astype(np.int64), movies - 1) * 7_919) % (5 * movies)
    session = _FIRST + (user * 104_729) % (_LAST - _FIRST)
    columns = {
        "userId": user,
        "movieId": movie,
        "rating": random.integers(1, 11, size) / 2,
        "timestamp": session + random.integers(0, 2_000, size),
    }
    return pa.table(columns)


def main() -> None:
    """Write ratings.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the file")
    parser.add_argument("--rows", type=int, default=20_000_263)
    parser.add_argument("--users", type=int, default=138_493)
    parser.add_argument("--movies", type=int, default=26_744)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(options.seed)
    ends = np.cumsum(lengths(random, options.users, options.rows))
    with (options.output / "ratings.csv").open("wb") as sink:
        sink.write(b"userId,movieId,rating,timestamp\n")
        for start in tqdm(range(0, options.rows, _ROWS_PER_CHUNK), disable=None):
            rows = np.arange(start, min(start + _ROWS_PER_CHUNK, options.rows))
            users = 1 + np.searchsorted(ends, rows, side="right")
            written = pa_csv.WriteOptions(include_header=False, quoting_style="none")
            pa_csv.write_csv(chunk(random, users, options.movies), sink, written)


if __name__ == "__main__":
    main()
