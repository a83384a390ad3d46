"""Time the choice of the best of many items beside the matrix product that scores them.

    python scripts/bench/top_items_cpu.py [--items 1000000] [--output docs/benchmarks/top_items/cpu.json]

``hstu.train.corpus.recommend`` gathers and normalises the items of a corpus chunk by chunk, scores all users, leaves
out what they have seen, and keeps the best. Its peers are the product alone, and the product with a selection of the
best from each chunk's scores (topk), where chunks are as large as those that are embedded, or as those that are scored
at once and stay in the caches. All take their turn in every round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from harness import begin, command_line, finish
from torch import Tensor

from hstu.train.corpus import BLOCK_QUERIES, CHUNK_ITEMS, CPU_PRODUCT_ITEMS, Corpus, Queries, recommend


def ways_of(options: argparse.Namespace) -> dict[str, Callable[[], tuple[np.ndarray, np.ndarray] | Tensor]]:
    """Name → what to time, on random vectors."""
    table = torch.randn(options.items, options.dim)
    vectors = torch.nn.functional.normalize(torch.randn(options.users, options.dim), dim=1)
    seen = np.random.default_rng(0).integers(0, options.items, options.users * options.seen)
    users = np.arange(options.users)
    queries = Queries(vectors, users, np.zeros_like(users), seen, np.full_like(users, options.seen))
    corpus = Corpus(lambda ids: table[ids], torch.arange(options.items), 1e-6)

    def product(chunk: int, chosen: bool) -> Tensor:
        last = vectors
        for first in range(0, options.items, chunk):
            items = table[first : first + chunk].t()
            for block in range(0, options.users, BLOCK_QUERIES):
                last = vectors[block : block + BLOCK_QUERIES] @ items
                if chosen:
                    last = last.topk(min(options.top, last.shape[1]), dim=1).values
        return last

    return {
        f"product{' and topk' * chosen}, {chunk} items at once": partial(product, chunk, chosen)
        for chosen in (False, True)
        for chunk in (CHUNK_ITEMS, CPU_PRODUCT_ITEMS)
    } | {"recommend": lambda: recommend(queries, corpus, options.top)}


def main() -> None:
    """Measure and print."""
    commands = command_line(__doc__, rounds=7, threads=1, output=True)
    add = commands.add_argument
    add("--items", type=int, default=1_000_000)
    add("--users", type=int, default=512)
    add("--seen", type=int, default=100, help="items that each user has seen")
    add("--dim", type=int, default=64, help="width of the vectors")
    add("--top", type=int, default=100, help="items per user")
    options = commands.parse_args()
    options.device = "cpu"
    _, report = begin(options)
    ways = ways_of(options)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            if number:  # the first round warms up
                times[name].append(time.process_time() - begun)
    of_chunks, of_cached, *_ = (median(own) for own in times.values())
    rows = [
        {"way": name, "median_s": round(median(own), 3), "fastest_s": round(min(own), 3),
         "of_product": round(median(own) / of_chunks, 2), "of_cached_product": round(median(own) / of_cached, 2)}
        for name, own in times.items()
    ]  # fmt: skip
    shape = {name: getattr(options, name) for name in ("items", "users", "seen", "dim", "top")}
    finish(report | shape | {"ways": rows}, options)


if __name__ == "__main__":
    main()
