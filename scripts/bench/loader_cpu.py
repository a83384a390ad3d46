"""Time how fast training batches are made from a sequence store; prints one JSON object.

python scripts/bench/loader_cpu.py [--store tmp_data/ml-1m --batch 128 --length 200 --rounds 5]

Batches are made in this process and in one worker, in turn. The report also has the share of its time that a device
waits for batches, if it consumes --tokens-per-core for each core of this process, and the rate of a large memory copy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import command_line, publish

from hstu.config.args import DatasetArgs
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.batches.loader import build_loader
from hstu.data.features.roles import resolve_roles
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import TrainSampler
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.throughput import ThroughputMeter

Batches = Iterator[int]
"""Tokens (items and actions) of one batch after the other."""
_COPIED_BYTES = 256 << 20


def store_batches(
    store: SequenceStore,
    options: argparse.Namespace,
    workers: int,
    negatives: Negatives | None = None,
    side: Sequence[str] = (),
) -> Batches:
    """Tokens of retrieval training batches with the features ``side``, loaded as in training."""
    args = DatasetArgs(
        dataset_name=store.name, max_sequence_length=options.length, shuffle=True, side_feature_names=list(side)
    )
    samples = build_samples(store, args, "retrieval", "train", seed=1)
    roles = resolve_roles(store, args)
    items = store.cardinality(store.item_feature)
    assembler = Assembler(options.batch, "retrieval", roles, items, seed=1, negatives=negatives)
    collator = Collator(StoreReader(store, samples, roles), assembler)
    sampler = TrainSampler(len(samples), options.batch, 0, 1, seed=1, shuffle=True)
    for batch in build_loader(collator, sampler, workers=workers):
        yield 2 * int(batch.item_lengths.sum())


def measured(batches: Batches, count: int) -> tuple[float, int]:
    """Seconds and tokens of the next ``count`` batches."""
    begun = time.perf_counter()
    tokens = sum(next(batches) for _ in range(count))
    return time.perf_counter() - begun, tokens


def data_wait(store: SequenceStore, options: argparse.Namespace) -> dict[str, float]:
    """Share of the time spent waiting for batches, by loader."""
    kinds = {"": None, ", 128 uniform negatives": Negatives("uniform", 128)}
    return {
        f"{workers} workers{kind}": wait_share(store_batches(store, options, workers, negatives), options)
        for kind, negatives in kinds.items()
        for workers in (0, 1)
    }


def wait_share(batches: Batches, options: argparse.Namespace) -> float:
    """Share of the time spent waiting for batches. A sleep stands for the device that consumes a batch."""
    rate = options.tokens_per_core * len(os.sched_getaffinity(0))
    meter = ThroughputMeter()
    timed = meter.timed(batches)
    for number in range(options.batches + 5):
        if number == 5:  # a worker takes a moment to start
            meter.take()
        time.sleep(next(timed) / rate)
    return round(meter.take().data_wait, 4)


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by copying a large array, the best of five."""
    source = np.ones(_COPIED_BYTES // 8)
    target = np.empty_like(source)

    def once() -> float:
        begun = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - begun

    return 2 * _COPIED_BYTES / min(once() for _ in range(5))


def main() -> None:
    """Run and report."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--store", type=Path, default=Path("tmp_data/ml-1m"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--batches", type=int, default=200, help="batches per round")
    parser.add_argument(
        "--tokens-per-core", type=float, default=0.5e6, help="tokens per second that a device consumes, for each core"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = SequenceStore.open(options.store)
    running = {f"{workers} workers": store_batches(store, options, workers) for workers in (0, 1)}
    for batches in running.values():
        measured(batches, options.batches // 4)
    rates: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, batches in running.items():
            seconds, tokens = measured(batches, options.batches)
            rates[name].append(tokens / seconds)
    publish(
        {
            "options": {name: str(value) for name, value in vars(options).items()},
            "cpus": len(os.sched_getaffinity(0)),
            "tokens_per_s": {name: round(statistics.median(each)) for name, each in rates.items()},
            "data_wait": data_wait(store, options),
            "copy_gb_per_s": round(copy_bytes_per_s() / 1e9, 2),
        }
    )


if __name__ == "__main__":
    main()
