"""Time HSTU attention on this machine's CPU at the ML-1M shape, and show that its cost follows Σ n².

    python scripts/bench/attention_cpu.py [--threads 2] [--repeats 30] [--output FILE.json]

Prints one JSON object: milliseconds (median and fastest; cpu: the least processor time, all threads together, which
other processes disturb less; compare it with one thread), forward and forward + backward, for 128 sequences of
107 tokens on average (at most 200), D 50, one head, relative bias; then for fixed lengths, the nanoseconds that one
pair of tokens costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hstu.ops.attention import hstu_attention
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias

LONGEST = 200


def movielens_lengths(batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths with the mean (107) and the bound (200) of ML-1M histories, many of them cut at the bound."""
    lengths = np.clip(rng.lognormal(mean=4.6, sigma=0.95, size=batch_size), 10, LONGEST).astype(np.int64)
    surplus = int(lengths.sum()) - 107 * batch_size
    while surplus:
        place = rng.integers(batch_size)
        step = int(np.sign(surplus))
        if 10 <= lengths[place] - step <= LONGEST:
            lengths[place] -= step
            surplus -= step
    return lengths


def make_layout(lengths: np.ndarray, rng: np.random.Generator) -> JaggedLayout:
    """A layout of items only, with times some minutes to months apart."""
    gaps = np.exp(rng.uniform(0, 16, int(lengths.sum()))).astype(np.int64)
    return build_layout(
        item_lengths=lengths,
        num_sequences=len(lengths),
        num_contextuals=0,
        num_candidates=None,
        tokens_per_item=1,
        target_group_size=1,
        device=torch.device("cpu"),
        item_times=torch.from_numpy(np.cumsum(gaps)),
    )


def time_ms(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and fastest of ``repeats`` runs, and the least processor time of one, after two that are not counted."""
    times, cpu_times = [], []
    for _ in range(repeats + 2):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - start) * 1e3)
        cpu_times.append((time.process_time() - cpu_start) * 1e3)
    return {
        "median": round(statistics.median(times[2:]), 2),
        "fastest": round(min(times[2:]), 2),
        "cpu": round(min(cpu_times[2:]), 2),
    }


def measure(layout: JaggedLayout, heads: int, width: int, with_bias: bool, repeats: int) -> dict[str, object]:
    """Time one layer's attention over ``layout``, whose plan is already made (as from the second layer on)."""
    q, k, v, grad = (torch.randn(layout.num_tokens, heads, width) for _ in range(4))
    tables = RelativeBias(torch.randn(2 * LONGEST - 1) * 0.02, torch.randn(NUM_TIME_BUCKETS) * 0.02)
    leaves = [q, k, v, *([tables.position_weight, tables.time_weight] if with_bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()

    def forward() -> Tensor:
        bias = tables if with_bias else None
        return hstu_attention(q, k, v, layout, alpha=width**-0.5, scaling_seqlen=LONGEST, bias=bias)

    start = time.perf_counter()
    forward()
    first_ms = (time.perf_counter() - start) * 1e3
    both = time_ms(lambda: torch.autograd.grad(forward(), leaves, grad), repeats)
    return {
        "tokens": layout.num_tokens,
        "pairs": int((layout.seqlens**2).sum()),
        "relative_bias": with_bias,
        "first_forward_ms": round(first_ms, 2),
        "forward_ms": time_ms(forward, repeats),
        "forward_backward_ms": both,
        "fastest_ns_per_pair": round(both["fastest"] * 1e6 / int((layout.seqlens**2).sum()), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", default=None, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    shape = make_layout(movielens_lengths(128, rng), rng)
    report = {
        "threads": args.threads,
        "torch": torch.__version__,
        "ml_1m": [measure(shape, 1, 50, with_bias, args.repeats) for with_bias in (True, False)],
        "fixed_length": {
            f"{batch} x {length}": measure(make_layout(np.full(batch, length), rng), 1, 50, True, args.repeats)
            for batch, length in ((128, 50), (128, 100), (128, 200), (32, 400), (8, 800))
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        with open(args.output, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
