"""Open and read a store as large as KuaiRand-27K with and without the features of its videos; prints one JSON object.

    python scripts/bench/features_cpu.py --work DIR [--events 30000000 --batch 32 --length 4096 --rounds 5]

The store is random and stays in --work/store, where the next run finds it. Its features are as large as those of
KuaiRand-27K: tags are lists of one or two, authors and music have millions of values. All ways of reading take turns
in every round. Waiting for batches is measured as in loader_cpu.py.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import numpy as np
import torch
from harness import command_line, publish
from loader_cpu import copy_bytes_per_s, measured, opened, store_batches, wait_share

from hstu.data.jagged import run_offsets
from hstu.data.store import SequenceStore
from hstu.data.store_writer import StoreWriter

USERS, VIDEOS = 27_285, 32_038_725
CATEGORIES = {"video_type": 4, "upload_type": 30, "music_type": 8, "author_id": 8_000_000, "music_id": 16_000_000}
"""Feature of the videos → its values."""
TAGS = 100
READ = {
    "no features": (),
    "tag": ("tag",),
    "author_id": ("author_id",),
    "six video features": ("tag", *CATEGORIES),
    "six video features and three of time": ("tag", *CATEGORIES, "hour_of_day", "day_of_week", "time_gap"),
}
_CHUNK = 1 << 22


def make_store(target: Path, events: int) -> None:
    """Write a random store: log-normal histories, and videos of which few are popular."""
    random = np.random.default_rng(1)

    def fill(array: np.ndarray, highest: int) -> None:
        for start in range(0, len(array), _CHUNK):
            part = array[start : start + _CHUNK]
            part[:] = random.integers(0, highest, len(part))

    weights = random.lognormal(0, 0.8, USERS)
    lengths = 1 + np.floor(weights / weights.sum() * (events - USERS)).astype(np.int64)
    lengths[0] += events - lengths.sum()
    with StoreWriter(target, name="kuairand-27k-sized", command=None) as writer:
        writer.write_offsets(run_offsets(lengths))
        items = writer.create_sequence("video_id", "item", cardinality=VIDEOS, length=events)
        times = writer.create_sequence("timestamp", "timestamp", cardinality=None, length=events)
        fill(writer.create_sequence("action", "action", cardinality=256, length=events), 256)
        for start in range(0, events, _CHUNK):
            uniform = random.random(min(_CHUNK, events - start))
            ranks = np.exp(uniform * np.log(VIDEOS)).astype(np.int64) - 1  # Zipf-distributed
            items[start : start + len(uniform)] = ranks * 7_368_787 % VIDEOS  # the popular ones are spread
            times[start : start + len(uniform)] = 1_650_000_000 + np.arange(start, start + len(uniform))
        writer.write_context("user_id", np.arange(USERS), cardinality=USERS)
        writer.write_vocabulary("user_id", np.arange(USERS))
        writer.write_vocabulary("video_id", np.arange(VIDEOS))
        for feature, cardinality in CATEGORIES.items():
            fill(writer.create_sequence(feature, "item_feature", cardinality=cardinality, length=VIDEOS), cardinality)
        offsets = writer.create_list_offsets("tag", items=VIDEOS)
        offsets[0] = 0
        np.cumsum(random.integers(1, 3, VIDEOS, dtype=np.int64), out=offsets[1:])
        fill(writer.create_sequence("tag", "item_feature", cardinality=TAGS, length=int(offsets[-1])), TAGS)
        fill(writer.create_item_numbers("video_duration", width=1, items=VIDEOS), 300_000)


def main() -> None:
    """Run and report."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--work", type=Path, required=True, help="directory for the store")
    parser.add_argument("--events", type=int, default=30_000_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=20, help="batches per round")
    parser.add_argument(
        "--tokens-per-core", type=float, default=0.5e6, help="tokens per second that a device consumes, for each core"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.work / "store"
    if not path.exists():
        make_store(path, options.events)
    opening = [opened(path) for _ in range(options.rounds)]
    store = SequenceStore.open(path)
    running = {kind: store_batches(store, options, 0, side=side) for kind, side in READ.items()}
    for batches in running.values():
        measured(batches, options.batches)
    rates: dict[str, list[float]] = {kind: [] for kind in READ}
    for _ in range(options.rounds):
        for kind, batches in running.items():
            seconds, tokens = measured(batches, options.batches)
            rates[kind].append(tokens / seconds)
    report = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "cpus": len(os.sched_getaffinity(0)),
        "store_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "open_s": statistics.median(each["open_s"] for each in opening),
        "open_rss_bytes": statistics.median(each["rss_bytes"] for each in opening),
        "tokens_per_s": {kind: round(statistics.median(found)) for kind, found in rates.items()},
        "data_wait": {
            kind: {
                f"{workers} workers": wait_share(store_batches(store, options, workers, side=READ[kind]), options)
                for workers in (0, 1)
            }
            for kind in ("no features", "six video features")
        },
        "copy_gb_per_s": round(copy_bytes_per_s() / 1e9, 2),
    }
    publish(report)


if __name__ == "__main__":
    main()
