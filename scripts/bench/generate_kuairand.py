"""Write random data in KuaiRand's files, at any size: what preprocessing at full scale is measured on.

python scripts/bench/generate_kuairand.py --output DIR --rows 30000000 [--variant 27k --users 27285 --videos 32038725]

Histories are log-normal in length, videos Zipf-distributed, times tied now and then, and some users occur in one period
only. Users are those of --user_features (a user_features file of any KuaiRand), else invented. Repeatable: the same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.data.datasets import DATASETS
from hstu.data.preprocess.kuairand import ACTION_BITS

COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time"),
    *("comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
RATES = dict(zip(ACTION_BITS, (0.35, 0.015, 0.001, 0.003, 0.001, 0.0005, 0.25, 0.01), strict=True))
"""Share of events with a signal, about those of the real data."""
USER_COLUMNS = (
    *("user_id", "user_active_degree", "follow_user_num_range", "fans_user_num_range"),
    *("friend_user_num_range", "register_days_range"),
)
PERIODS = ((1_649_347_200_000, 14), (1_650_556_800_000, 17))
"""First millisecond and days of the two periods of the logs."""
_DAY_MS = 86_400_000
_ONE_PERIOD_ONLY = 0.03
_TIED = 0.05
_ROWS_PER_CHUNK = 1 << 20
_ZIPF = 1.05


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the files")
    parser.add_argument("--rows", type=int, required=True, help="interactions over all logs")
    parser.add_argument("--variant", choices=("pure", "1k", "27k"), default="27k", help="whose file names")
    parser.add_argument("--users", type=int, default=27_285)
    parser.add_argument("--videos", type=int, default=32_038_725)
    parser.add_argument("--user_features", type=Path, help="a user_features file; its first users are taken")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(options.seed)
    *logs, features = DATASETS[f"kuairand-{options.variant}"].raw_formats[0].files
    users = write_users(options.output / features, options.users, options.user_features)
    shares = share_out(random, len(users), options.rows, len(logs))
    with tqdm(total=options.rows, unit=" rows", unit_scale=True, disable=None) as progress:
        for log, counts in zip(logs, shares, strict=True):
            period = PERIODS[0 if log.startswith("log_standard_4_08") else 1]
            write_log(options.output / log, random, users, counts, options.videos, period, progress)


def write_users(target: Path, number: int, source: Path | None) -> np.ndarray:
    """The user_features file; returns the users' ids, int64."""
    if source is not None:
        with source.open(newline="", encoding="utf-8") as lines:
            rows = [row for row, _ in zip(csv.DictReader(lines), range(number), strict=False)]
    else:
        rows = []
    known = {int(row["user_id"]) for row in rows}
    invented = (user for user in range(10**9) if user not in known)
    rows += [
        {name: f"value {user % 7}" for name in USER_COLUMNS} | {"user_id": str(user)}
        for user in (next(invented) for _ in range(number - len(rows)))
    ]
    with target.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, USER_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return np.array([int(row["user_id"]) for row in rows])


def share_out(random: np.random.Generator, users: int, rows: int, logs: int) -> np.ndarray:
    """Events of each user in each log, int64 [logs, users], that add up to ``rows``."""
    weights = random.lognormal(0, 0.8, users) * random.dirichlet(np.full(logs, 4.0), users).T
    absent = random.random(users) < _ONE_PERIOD_ONLY
    half, late = logs // 2, random.random(users) < 0.5
    weights[:half, absent & late] = 0
    weights[half:, absent & ~late] = 0
    counts = np.floor(weights / weights.sum() * rows).astype(np.int64)
    largest = np.unravel_index(counts.argmax(), counts.shape)
    counts[largest] += rows - counts.sum()
    return counts


def write_log(
    target: Path,
    random: np.random.Generator,
    users: np.ndarray,
    counts: np.ndarray,
    videos: int,
    period: tuple[int, int],
    progress: tqdm[NoReturn],
) -> None:
    """One log, its users in random order, the events of each in time order."""
    order = random.permutation(len(users))
    ends = np.cumsum(counts[order])
    with target.open("wb") as sink:
        sink.write((",".join(COLUMNS) + "\n").encode())
        for start in range(0, int(ends[-1]), _ROWS_PER_CHUNK):
            rows = np.arange(start, min(start + _ROWS_PER_CHUNK, int(ends[-1])))
            user = users[order[np.searchsorted(ends, rows, side="right")]]
            table = chunk(random, user, videos, period)
            pa_csv.write_csv(table, sink, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
            progress.update(len(rows))


def chunk(random: np.random.Generator, user: np.ndarray, videos: int, period: tuple[int, int]) -> pa.Table:
    """The next events, ``user`` [n] their users."""
    size = len(user)
    first, days = period
    time = first + random.integers(0, days * _DAY_MS, size)
    time = time[np.lexsort((time, np.cumsum(np.diff(user, prepend=user[:1]) != 0)))]
    tied = (random.random(size) < _TIED) & (np.diff(user, prepend=-1) == 0)
    time[tied] = time[np.flatnonzero(tied) - 1]
    # Zipf over ranks by inversion of its continuous distribution; ranks are spread over the ids by a fixed stride.
    uniform = random.random(size)
    ranks = ((videos ** (1 - _ZIPF) - 1) * uniform + 1) ** (1 / (1 - _ZIPF)) - 1
    video = (np.minimum(ranks.astype(np.int64), videos - 1) * 7_368_787) % videos
    small = random.integers(0, 60_000, size)
    values = {
        "user_id": user,
        "video_id": video,
        "date": 20_220_408 + (time - first) // _DAY_MS,
        "hourmin": time // 60_000 % 1440,
        "time_ms": time,
        "play_time_ms": small,
        "duration_ms": small + 1,
        "profile_stay_time": small % 3,
        "comment_stay_time": small % 5,
        "is_rand": np.zeros(size, dtype=np.int64),
        "tab": small % 8,
    } | {name: (random.random(size) < rate).astype(np.int64) for name, rate in RATES.items()}
    return pa.table({name: values[name] for name in COLUMNS})


if __name__ == "__main__":
    main()
