"""Time scoring candidates and appending an event with a cached history, and the same by whole forwards, on a CPU.

    python scripts/bench/incremental_cpu.py [--events 4000] [--candidates 1000] [--layers 4] [--rounds 5] [--one-token]
        [--output docs/benchmarks/incremental/incremental.json]

One user, random weights, float32; each event is an item and an action token, or one token with --one-token. Whole
forwards use the kernels of training; they run once per micro-batch of some candidates, or once with all of them. The
time of many forwards is that of one, measured, times their number. Each answer is compared with the whole forward's.
FLOPs are those of the matrix products of the layers, counted exactly. "processor_s" is time of this process's threads,
which other processes do not change.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from harness import Row, command_line, publish
from torch import Tensor
from torchrec import JaggedTensor

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch, ItemColumns, keyed_jagged
from hstu.model.inputs import SequenceFeatures
from hstu.model.stack import SequenceEncoder, kernel_shapes
from hstu.ops.select import select_kernels
from hstu.serve.pages import Prefix, PrefixCache
from hstu.serve.prefix import IncrementalEncoder

HEADS, HEAD_DIM = 4, 64
HIDDEN = HEADS * HEAD_DIM
IDS = 10_000


class Benchmark:
    """One user with a history and candidates, and the model."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.events, self.candidates = options.events, options.candidates
        self.network = NetworkArgs(
            num_layers=options.layers,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            kv_channels=HEAD_DIM,
            dtype_str="float32",
            position_encoding=("relative_bias",),
            interleave_actions=not options.one_token,
        )
        features = SequenceFeatures("item", "action", (), max_items=self.events + self.candidates)
        kernels = select_kernels("cutlass", False, torch.device("cpu"), kernel_shapes(self.network))
        self.encoder = SequenceEncoder(self.network, features, kernels).eval()
        self.per_item = features.tokens_per_item(self.network)
        self.tables = {name: torch.randn(IDS, HIDDEN) / HIDDEN**0.5 for name in ("item", "action")}
        rng = np.random.default_rng(0)
        total = self.events + self.candidates + 1
        self.ids = {name: rng.integers(0, IDS, total) for name in self.tables}
        times = np.cumsum(rng.integers(0, 20_000, self.events + 1))
        self.times = np.concatenate([times, np.full(self.candidates, times[-1] + 60)])
        cache = PrefixCache(
            self.network,
            capacity_bytes=options.cache_bytes,
            max_tokens=(self.events + 1) * self.per_item,
            device=torch.device("cpu"),
        )
        self.incremental = IncrementalEncoder(self.encoder, cache, self.embeddings_of, options.at_once)

    def embeddings_of(self, batch: HSTUBatch) -> dict[str, JaggedTensor]:
        """Rows of the tables."""
        features = batch.features.to_dict()
        return {
            name: JaggedTensor(table[features[name].values()], lengths=features[name].lengths())
            for name, table in self.tables.items()
        }

    def batch(self, start: int, stop: int, candidates: int = 0) -> HSTUBatch:
        """Events [start, stop), then the first candidates."""
        first = self.events + 1
        chosen = np.concatenate([np.arange(start, stop), np.arange(first, first + candidates)])
        lengths, shown = np.array([len(chosen)]), np.array([candidates])
        return HSTUBatch(
            features=keyed_jagged({n: ids[chosen] for n, ids in self.ids.items()}, dict.fromkeys(self.ids, lengths)),
            num_candidates=torch.from_numpy(shown),
            num_labels=torch.from_numpy(shown),
            labels=torch.zeros(candidates, dtype=torch.int64),
            user_ids=torch.zeros(1, dtype=torch.int64),
            items=ItemColumns(timestamps=torch.from_numpy(self.times[chosen])),
            real_batch_size=1,
            item_lengths=lengths,
            num_candidates_host=shown,
            num_labels_host=shown,
        )

    def encoded(self, key: str) -> Prefix:
        """The cached history, once for each key."""
        self.incremental.encode([key], self.batch(0, self.events))
        prefix = self.incremental.cache.find(key)
        assert prefix is not None
        return prefix

    def whole(self, batch: HSTUBatch) -> Tensor:
        """All tokens by one forward."""
        tokens: Tensor = self.encoder(self.embeddings_of(batch), batch)[0]
        return tokens

    def flops(self, new: int, prefix: int, candidates: int = 0) -> float:
        """Of the layers: ``new`` tokens of the history after ``prefix`` cached ones, then candidates of one item each.

        candidates: 0, or items with their actions.
        """
        history, size = prefix + new, self.per_item
        pairs = new * prefix + new * (new + 1) / 2 + candidates * (size * history + size * (size + 1) / 2)
        tokens = new + candidates * size
        return self.network.num_layers * (2.0 * tokens * HIDDEN * 5 * HIDDEN + 4.0 * HIDDEN * pairs)

    def scored_flops(self) -> float:
        """Of the candidates alone: their actions are not computed."""
        history, count = self.events * self.per_item, self.candidates
        return self.network.num_layers * (2.0 * count * HIDDEN * 5 * HIDDEN + 4.0 * HIDDEN * count * (history + 1))


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, Row]:
    """Median seconds of each by the clock and of the processor; all take their turn in each round, one not timed."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            clock, processor = time.perf_counter(), time.process_time()
            function()
            if number:
                found[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return {
        name: {"seconds": statistics.median(clocks), "processor_s": statistics.median(processors)}
        for name, times in found.items()
        for clocks, processors in [tuple(zip(*times, strict=True))]
    }


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def run(options: argparse.Namespace) -> Row:
    """The report."""
    bench = Benchmark(options)
    events, candidates, per_item = bench.events, bench.candidates, bench.per_item
    incremental, history = bench.incremental, bench.batch(0, events)
    shown, tail = bench.batch(events - 1, events, candidates), bench.batch(events - 2, events + 1)
    prefix, extended = bench.encoded("score"), bench.encoded("append")
    kept = incremental.kept_items(prefix, 1)
    assert kept is not None
    whole = bench.batch(0, events, candidates)
    micro_batches = {size: bench.batch(0, events, size) for size in options.micro_batches if size <= candidates}

    def append() -> Tensor:
        return incremental.append(extended, "append", tail, events + 1 - kept, kept)

    scores = incremental.score(prefix, shown)
    of_candidates = deviation(scores, bench.whole(whole)[-candidates * per_item :: per_item])
    longer = bench.batch(0, events + 1)
    of_append = deviation(append(), bench.whole(longer)[-1])
    functions: dict[str, Callable[[], object]] = {
        "encode": lambda: incremental.encode(["encode"], history),
        "append": append,
        "score": lambda: incremental.score(prefix, shown),
        "whole": lambda: bench.whole(whole),
    }
    for size, batch in micro_batches.items():
        functions[f"whole with {size}"] = lambda batch=batch: bench.whole(batch)  # type: ignore[misc]
    times = measure(functions, options.rounds)
    return report(bench, options, [*micro_batches], times, {"score": of_candidates, "append": of_append}, events - kept)


def report(
    bench: Benchmark,
    options: argparse.Namespace,
    micro_batches: list[int],
    times: dict[str, Row],
    deviations: dict[str, float],
    redone: int,
) -> Row:
    """Times and FLOPs of each way, and relative to the cache."""
    per_item, candidates = bench.per_item, bench.candidates
    tokens = bench.events * per_item
    cached = times["score"] | {"gflop": bench.scored_flops() / 1e9}
    encode = times["encode"] | {"gflop": bench.flops(tokens, 0) / 1e9}
    new = (redone + 1) * per_item
    append = times["append"] | {"gflop": bench.flops(new, tokens - redone * per_item) / 1e9}
    ways = {
        f"one forward with all {candidates:,}": times["whole"] | {"gflop": bench.flops(tokens, 0, candidates) / 1e9}
    }
    for size in micro_batches:
        forwards, rest = divmod(candidates, size)
        number = forwards + bool(rest)
        gflop = (forwards * bench.flops(tokens, 0, size) + (bench.flops(tokens, 0, rest) if rest else 0)) / 1e9
        one = times[f"whole with {size}"]
        ways[f"{number:,} forwards with {size}"] = {name: value * number for name, value in one.items()} | {
            "gflop": gflop
        }
    both = {name: cached[name] + encode[name] for name in cached}
    ways["cache, history encoded first"] = both
    rows = [{"way": "cache", **cached}] + [
        {"way": way, **each, **{f"{name} / cache": each[name] / cached[name] for name in cached}}
        for way, each in ways.items()
    ]
    return {
        "events": bench.events,
        "tokens": tokens,
        "candidates": candidates,
        "layers": bench.network.num_layers,
        "width": HIDDEN,
        "heads": HEADS,
        "candidates_at_once": options.at_once,
        "page_tokens": bench.incremental.cache.page_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cache_bytes_of_the_history": -(-tokens // bench.incremental.cache.page_tokens)
        * bench.incremental.cache.page_bytes,
        "deviation": {name: float(f"{value:.2g}") for name, value in deviations.items()},
        "scoring": [_rounded(row) for row in rows],
        "encode": _rounded(encode),
        "append": _rounded(append | {f"{name} / encode": append[name] / encode[name] for name in append}),
    }


def _rounded(row: Row) -> Row:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    """Run the benchmark."""
    parser = command_line(__doc__, rounds=5, threads=1, output=True)
    parser.add_argument("--events", type=int, default=4000)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--one-token", action="store_true", help="add each action to its item's token")
    parser.add_argument("--at-once", type=int, default=256, help="candidates of a micro-batch with the cache")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 16, 64, 256], help="of whole forwards")
    parser.add_argument("--cache-bytes", type=int, default=1 << 30)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    publish(run(options), options.output)


if __name__ == "__main__":
    main()
