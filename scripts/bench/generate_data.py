"""Write random data in the files of KuaiRand, at any size, to measure preprocessing.

    python scripts/bench/generate_data.py --output DIR --rows 30000000 [--users 27285 --items 32038725] [--videos]

Histories have log-normal lengths, items are Zipf-distributed, and some events of a user happen at the same time. Users
of KuaiRand come in random order with their events in order of time, and some occur in one period only. With
--videos there is a table of all videos. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from harness import command_line
from tqdm import tqdm

from hstu.data.datasets import DATASETS
from hstu.data.datasets.kuairand import ACTION_BITS

COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time"),
    *("comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
RATES = dict(zip(ACTION_BITS, (0.35, 0.015, 0.001, 0.003, 0.001, 0.0005, 0.25, 0.01), strict=True))
"""Share of the events that have each signal, roughly as in the real data."""
USER_COLUMNS = (
    *("user_id", "user_active_degree", "follow_user_num_range", "fans_user_num_range"),
    *("friend_user_num_range", "register_days_range"),
)
VIDEO_COLUMNS = (
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type", "video_duration", "music_id", "music_type"),
    "tag",
)
UPLOAD_TYPES = pa.array(["LongImport", "Web", "ShortImport", "Kmovie", "ShareFromOtherApp"])
TAGS = 70
PERIODS = ((1_649_347_200_000, 14), (1_650_556_800_000, 17))
"""First millisecond and number of days of the two periods of the logs."""
_DAY_MS = 86_400_000
_ONE_PERIOD_ONLY = 0.03
_TIED = 0.05
_ROWS_PER_CHUNK = 1 << 20


def zipf_ranks(random: np.random.Generator, size: int, items: int, exponent: float) -> np.ndarray:
    """Popularity ranks int64 [size] in [0, items), by inversion of the continuous Zipf distribution."""
    power = 1 - exponent
    ranks = ((items**power - 1) * random.random(size) + 1) ** (1 / power) - 1
    return np.minimum(ranks.astype(np.int64), items - 1)


def write_rows(
    target: Path, names: Sequence[str], counts: np.ndarray, chunk: Callable[[np.ndarray], pa.Table], bar: tqdm[NoReturn]
) -> None:
    """Write a CSV file chunk by chunk.

    counts: rows of each user, int64 [users]; chunk: makes the rows for users given by their index, int64 [rows].
    """
    ends = np.cumsum(counts)
    with target.open("wb") as sink:
        sink.write((",".join(names) + "\n").encode())
        for start in range(0, int(ends[-1]), _ROWS_PER_CHUNK):
            rows = np.arange(start, min(start + _ROWS_PER_CHUNK, int(ends[-1])))
            table = chunk(np.searchsorted(ends, rows, side="right"))
            pa_csv.write_csv(table, sink, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
            bar.update(len(rows))


def write_kuairand(options: argparse.Namespace, random: np.random.Generator, bar: tqdm[NoReturn]) -> None:
    """Write the logs and the user_features file."""
    raw_format = DATASETS[f"kuairand-{options.variant}"].raw_formats[0]
    *logs, features = raw_format.files
    if options.videos:
        write_videos(options.output / raw_format.optional_files[0], options.items)
    users = write_users(options.output / features, options.users, options.user_features)
    for log, counts in zip(logs, share_out(random, len(users), options.rows, len(logs)), strict=True):
        order = random.permutation(len(users))
        period = PERIODS[0 if log.startswith("log_standard_4_08") else 1]

        def chunk(index: np.ndarray, order: np.ndarray = order, period: tuple[int, int] = period) -> pa.Table:
            return kuairand_events(random, users[order[index]], options.items, *period)

        write_rows(options.output / log, COLUMNS, counts[order], chunk, bar)


def write_users(target: Path, number: int, source: Path | None) -> np.ndarray:
    """Write a user_features file: the first users of ``source``, then invented ones. Returns their ids, int64."""
    rows = []
    if source is not None:
        with source.open(newline="", encoding="utf-8") as lines:
            rows = [row for row, _ in zip(csv.DictReader(lines), range(number), strict=False)]
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


def write_videos(target: Path, number: int) -> None:
    """Write a video_features_basic file. A fourth of the videos have two tags, and some have none."""
    random = np.random.default_rng(number)
    none, tags = pa.array([""]), pa.array(list(map(str, range(TAGS))))
    with target.open("wb") as sink:
        sink.write((",".join(VIDEO_COLUMNS) + "\n").encode())
        for start in range(0, number, _ROWS_PER_CHUNK):
            size = min(_ROWS_PER_CHUNK, number - start)
            one, two = (tags.take(pa.array(random.integers(0, TAGS, size))) for _ in range(2))
            kind = pa.array(random.random(size))
            several = pc.if_else(pc.less(kind, 0.25), pc.binary_join_element_wise(one, two, ","), one)
            values = {
                "video_id": np.arange(start, start + size),
                "author_id": random.integers(0, number // 4 + 1, size),
                "video_type": pc.if_else(pc.less(kind, 0.99), "NORMAL", "AD"),
                "upload_dt": pa.array(["2022-04-10"]).take(pa.array(np.zeros(size, dtype=np.int64))),
                "upload_type": UPLOAD_TYPES.take(pa.array(random.integers(0, len(UPLOAD_TYPES), size))),
                "video_duration": random.integers(1_000, 300_000, size).astype(np.float64),
                "music_id": random.integers(0, number // 2 + 1, size) * 1_000_003,
                "music_type": random.choice([9.0, 4.0, 8.0], size),
                "tag": pc.if_else(pc.less(kind, 0.98), several, none[0]),
            }
            table = pa.table(values)
            pa_csv.write_csv(table, sink, pa_csv.WriteOptions(include_header=False, quoting_style="needed"))


def share_out(random: np.random.Generator, users: int, rows: int, logs: int) -> np.ndarray:
    """Events of each user in each log, int64 [logs, users], which add up to ``rows``."""
    weights = random.lognormal(0, 0.8, users) * random.dirichlet(np.full(logs, 4.0), users).T
    absent = random.random(users) < _ONE_PERIOD_ONLY
    half, late = logs // 2, random.random(users) < 0.5
    weights[:half, absent & late] = 0
    weights[half:, absent & ~late] = 0
    counts = np.floor(weights / weights.sum() * rows).astype(np.int64)
    largest = np.unravel_index(counts.argmax(), counts.shape)
    counts[largest] += rows - counts.sum()
    return counts


def kuairand_events(random: np.random.Generator, user: np.ndarray, videos: int, first: int, days: int) -> pa.Table:
    """Events of the users ``user`` [n] in a period of ``days`` days from millisecond ``first`` on."""
    size = len(user)
    time = first + random.integers(0, days * _DAY_MS, size)
    time = time[np.lexsort((time, np.cumsum(np.diff(user, prepend=user[:1]) != 0)))]
    tied = (random.random(size) < _TIED) & (np.diff(user, prepend=-1) == 0)
    time[tied] = time[np.flatnonzero(tied) - 1]
    video = zipf_ranks(random, size, videos, 1.05) * 7_368_787 % videos  # spread the popular ones over all ids
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


def main() -> None:
    """Write the files."""
    add = (parser := command_line(__doc__)).add_argument
    add("--output", type=Path, required=True, help="directory for the files")
    add("--rows", type=int, required=True, help="events in all files together")
    add("--users", type=int, default=27_285)
    add("--items", type=int, default=32_038_725, help="videos")
    add("--variant", choices=("pure", "1k", "27k"), default="27k", help="the KuaiRand whose file names are used")
    add("--videos", action="store_true", help="write a table of all videos, too")
    add("--user_features", type=Path, help="a user_features file of KuaiRand; its first users are taken")
    add("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=options.rows, unit=" rows", unit_scale=True, disable=None) as bar:
        write_kuairand(options, np.random.default_rng(options.seed), bar)


if __name__ == "__main__":
    main()
