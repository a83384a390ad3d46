"""Time the loader beside a reader that parses one row of text per sample; prints one JSON object.

python scripts/bench/loader_cpu.py [--store tmp_data/ml-1m --batch 128 --length 200 --rounds 5]

Both read the same histories batch by batch in turn, each in this process and in one worker: the loader from a sequence
store, the other from a CSV file with one row per user whose cells are JSON lists. The report also has

- the share of its time that a device waits for batches, if it consumes --tokens-per-core for each core of this process
- the rate of a large memory copy on this machine
- seconds and memory to open a store of KuaiRand-27K's size, each in a fresh process (its files are sparse)
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT, command_line, publish

from hstu.config.args import DatasetArgs
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.batches.loader import build_loader
from hstu.data.features.roles import resolve_roles
from hstu.data.negatives import Negatives
from hstu.data.sampling.sampler import TrainSampler
from hstu.data.sampling.samples import build_samples
from hstu.data.store.files import sha256
from hstu.data.store.layout import META_FILE
from hstu.data.store.meta import FORMAT, VERSION, sealed
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import array_header
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


def write_rows(store: SequenceStore, file: Path) -> None:
    """Write one row per user: the contextual codes, then items, actions and times as JSON lists."""
    offsets = store.offsets()
    names = [store.item_feature, store.action_feature or "", store.timestamp_feature or ""]
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow([*store.contextual_features, *filter(None, names)])
        for user in range(store.num_users):
            events = slice(offsets[user], offsets[user + 1])
            lists = [json.dumps(store.sequence(name)[events].tolist()) for name in names if name]
            writer.writerow([*(store.context(name)[user] for name in store.contextual_features), *lists])


class RowDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The usual reader: keeps all rows in memory as text, and parses, cuts and pads each sample by itself."""

    def __init__(self, file: Path, length: int) -> None:
        with file.open(newline="") as lines:
            self.rows = list(csv.DictReader(lines))
        self.length = length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {}
        for name, cell in self.rows[index].items():
            if cell.startswith("["):
                values = json.loads(cell)[:-2][-self.length :]
                sample[f"{name}_length"] = torch.tensor(len(values))
                sample[name] = torch.tensor(values + [0] * (self.length - len(values)), dtype=torch.int64)
            else:
                sample[name] = torch.tensor(int(cell))
        return sample


def row_batches(file: Path, item: str, options: argparse.Namespace, workers: int) -> Batches:
    """Tokens of shuffled, padded batches, without end."""
    dataset = RowDataset(file, options.length)
    loader = torch.utils.data.DataLoader(
        dataset, options.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        for batch in loader:
            yield 2 * int(batch[f"{item}_length"].sum())


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


def sparse_store(path: Path, users: int, events: int, items: int) -> SequenceStore:
    """A store of any size whose large arrays are sparse files: every code and every time is 0."""
    path.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}

    def create(file: str, dtype: str, length: int, values: np.ndarray | None = None) -> None:
        header, body = array_header(dtype, length), length * np.dtype(dtype).itemsize
        with (path / file).open("wb") as sink:
            sink.write(header)
            sink.write(b"" if values is None else values.astype(dtype).tobytes())
            sink.truncate(len(header) + body)
        described = {"dtype": dtype, "length": length, "bytes": len(header) + body}
        files[file] = described if values is None else {**described, "sha256": sha256(path / file)}

    create("offsets.npy", "<i8", users + 1, np.linspace(0, events, users + 1).astype(np.int64))
    create("context.user_id.npy", "<i4", users, np.arange(users))
    create("sequence.video_id.npy", "<i4", events)
    create("sequence.action.npy", "<i4", events)
    create("sequence.timestamp.npy", "<i8", events)
    create("vocabulary.video_id.npy", "<i8", items)
    create("vocabulary.user_id.npy", "<i8", users, np.arange(users))
    described = ("name", "role", "dtype", "cardinality", "has_vocab")
    features = [
        ("user_id", "context", "<i4", users, True),
        ("video_id", "item", "<i4", items, True),
        ("action", "action", "<i4", 256, False),
        ("timestamp", "timestamp", "<i8", None, False),
    ]
    meta = {
        **{"format": FORMAT, "version": VERSION, "name": "sparse", "command": None, "num_users": users},
        **{"num_events": events, "statistics": {}, "sources": {}, "files": files},
        "features": [dict(zip(described, feature, strict=True)) for feature in features],
    }
    (path / META_FILE).write_text(sealed(meta))
    return SequenceStore.open(path)


OPEN = """
import json, psutil, sys, time
from hstu.data.store.sequence_store import SequenceStore
before = psutil.Process().memory_info().rss
begun = time.perf_counter()
store = SequenceStore.open(sys.argv[1])
seconds = time.perf_counter() - begun
print(json.dumps({"open_s": seconds, "rss_bytes": psutil.Process().memory_info().rss - before}))
"""


def opened(path: Path) -> dict[str, float]:
    """Seconds and resident bytes to open a store, in a fresh process."""
    root = ROOT
    command = [sys.executable, "-c", OPEN, str(path)]
    found: dict[str, float] = json.loads(subprocess.run(command, cwd=root, capture_output=True, check=True).stdout)
    return found


def main() -> None:
    """Run and report."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--store", type=Path, default=Path("tmp_data/ml-1m"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument(
        "--batches", type=int, default=20, help="batches of the text reader per round; the store reads 10 times as many"
    )
    parser.add_argument(
        "--tokens-per-core", type=float, default=0.5e6, help="tokens per second that a device consumes, for each core"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = SequenceStore.open(options.store)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        write_rows(store, rows)
        readers: dict[str, tuple[Callable[[], Batches], int]] = {
            "store": (lambda: store_batches(store, options, workers=0), 10 * options.batches),
            "store, one worker process": (lambda: store_batches(store, options, workers=1), 10 * options.batches),
            "text rows": (lambda: row_batches(rows, store.item_feature, options, 0), options.batches),
            "text rows, one worker process": (
                lambda: row_batches(rows, store.item_feature, options, 1),
                options.batches,
            ),
        }
        running = {name: make() for name, (make, _) in readers.items()}
        for name, batches in running.items():
            measured(batches, readers[name][1] // 4)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(options.rounds):
            for name, batches in running.items():
                seconds, tokens = measured(batches, readers[name][1])
                results[name].append((readers[name][1] * options.batch / seconds, tokens / seconds))
        sizes = {"KuaiRand-27K": (27_285, 322_278_385, 32_038_725), "a thousandth of it": (27_285, 322_278, 32_039)}
        start = {}
        for name, (users, events, items) in sizes.items():
            sparse_store(Path(folder) / name, users, events, items)
            start[name] = opened(Path(folder) / name)
    speed = {
        name: {
            "sequences_per_s": round(statistics.median(pair[0] for pair in pairs)),
            "tokens_per_s": round(statistics.median(pair[1] for pair in pairs)),
        }
        for name, pairs in results.items()
    }
    copied = copy_bytes_per_s()
    report = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "cpus": len(os.sched_getaffinity(0)),
        "speed": speed,
        "times_text_rows": {
            kind: round(speed[f"store{kind}"]["tokens_per_s"] / speed[f"text rows{kind}"]["tokens_per_s"], 1)
            for kind in ("", ", one worker process")
        },
        "data_wait": data_wait(store, options),
        "copy_gb_per_s": round(copied / 1e9, 2),
        "start": start,
    }
    publish(report)


if __name__ == "__main__":
    main()
