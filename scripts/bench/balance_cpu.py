"""How evenly the balanced shuffler shares global batches out, and what planning takes; one JSON object.

python scripts/bench/balance_cpu.py [--batch_size 32 --batches 50 --hidden_size 1024 --ranks 2 4 16 64]

For each distribution of lengths and number of ranks: the largest rank's cost over the mean, as a mean and a maximum
over the batches, with contiguous shares and with balanced ones; the bound that no sharing can beat, because a single
sequence costs more than the mean rank; and the milliseconds a plan takes. By tokens likewise, with the share of the
budget that is filled. A table of the same goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from itertools import islice
from typing import Any

import numpy as np

from hstu.config.args import NetworkArgs, RandomDistribution
from hstu.data.balance import Sharing
from hstu.data.collate import FeatureRoles
from hstu.data.sampler import TrainSampler
from hstu.data.synthetic import Distribution
from hstu.train.work import StepWork

LENGTHS = {
    "lognormal": RandomDistribution(dist_type="lognormal", low=1, mean=512, std=1.0),
    "zipf 1.05": RandomDistribution(dist_type="zipf", low=1, alpha=1.05),
    "zipf 1.2": RandomDistribution(dist_type="zipf", low=1, alpha=1.2),
    "uniform": RandomDistribution(dist_type="uniform", low=1),
}
ROLES = FeatureRoles("item", "action", ("user", "age", "region"))


def plans_of(num_samples: int, ranks: int, batch_size: int, sharing: Sharing, batches: int) -> tuple[Any, list[float]]:
    """Global batches, each the row numbers of every rank, and the milliseconds that one rank needed for each plan."""
    samplers = [
        TrainSampler(num_samples, batch_size, rank, ranks, seed=1, shuffle=True, sharing=sharing)
        for rank in range(ranks)
    ]
    iterators = [iter(sampler) for sampler in samplers]
    next(iter(samplers[0]))  # warm-up
    milliseconds, first = [], []
    next_plan = iterators[0].__next__
    for _ in range(batches):
        begun = time.perf_counter()
        first.append(next_plan().indices)
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    others = [[plan.indices for plan in islice(iterator, batches)] for iterator in iterators[1:]]
    # The first plan of an epoch also makes the epoch's order.
    return list(zip(first, *others, strict=True)), milliseconds[1:]


def ratios(batches: Any, weights: np.ndarray) -> list[float]:
    """Largest rank over mean rank, of each global batch."""
    sums = [[weights[share].sum() for share in shares] for shares in batches]
    return [float(max(row) / np.mean(row)) for row in sums]


def summary(values: list[float]) -> dict[str, float]:
    """Mean and maximum."""
    return {"mean": round(statistics.mean(values), 4), "max": round(max(values), 4)}


def measure(kind: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    num_samples = 2 * options.batches * options.batch_size * ranks
    uniforms = np.random.default_rng(0).uniform(1e-12, 1, num_samples)
    lengths = Distribution(LENGTHS[kind], options.max_sequence_length + 1).values(uniforms)
    network = NetworkArgs(
        num_layers=8,
        hidden_size=options.hidden_size,
        num_attention_heads=4,
        kv_channels=options.hidden_size // 4,
    )
    loads = StepWork(network, ROLES).loads(lengths, np.zeros_like(lengths))
    row: dict[str, Any] = {"lengths": kind, "ranks": ranks}
    for name, balance in (("contiguous", False), ("balanced", True)):
        shares, milliseconds = plans_of(
            num_samples, ranks, options.batch_size, Sharing(loads, balance), options.batches
        )
        row[name] = summary(ratios(shares, loads.costs))
        row[f"{name}_plan_ms"] = round(statistics.median(milliseconds), 3)
    batches = [np.concatenate(step) for step in shares]
    bound = [max(1.0, loads.costs[batch].max() * ranks / loads.costs[batch].sum()) for batch in batches]
    row["best_possible_at_least"] = summary([float(value) for value in bound])

    budget = max(int(options.batch_size * loads.tokens.mean()), int(loads.tokens.max()))
    row["tokens_per_rank"] = budget
    for name, balance in (("by_tokens", False), ("balanced_by_tokens", True)):
        sharing = Sharing(loads, balance, budget)
        shares, milliseconds = plans_of(num_samples, ranks, 8 * options.batch_size, sharing, options.batches)
        filled = [loads.tokens[share].sum() / budget for step in shares for share in step]
        row[name] = summary(ratios(shares, loads.costs)) | {"filled": round(float(np.mean(filled)), 4)}
        row[f"{name}_plan_ms"] = round(statistics.median(milliseconds), 3)
    return row


def table_row(row: dict[str, Any]) -> str:
    """A measurement as a line of text."""
    fixed = [f"{row[name]['mean']:.3f} ≤ {row[name]['max']:.3f}" for name in ("contiguous", "balanced")]
    tokens = [f"{row[name]['mean']:.3f}" for name in ("by_tokens", "balanced_by_tokens")]
    bound, filled = row["best_possible_at_least"]["max"], row["balanced_by_tokens"]["filled"]
    return (
        f"{row['lengths']:10s} {row['ranks']:5d}  {fixed[0]}  {fixed[1]}  {bound:.3f} {row['balanced_plan_ms']:.2f}"
        f"  {tokens[0]}  {tokens[1]}   {filled:.3f}  {row['balanced_by_tokens_plan_ms']:.2f}"
    )


def main() -> None:
    """Measure all distributions and numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a rank")
    parser.add_argument("--batches", type=int, default=50, help="global batches of each kind")
    parser.add_argument("--hidden_size", type=int, default=1024, help="width D = Hd: a / b is 30 D / 7 tokens")
    parser.add_argument("--max_sequence_length", type=int, default=2048, help="items; tokens are twice that and 3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 16, 64])
    options = parser.parse_args()
    rows = []
    print("lengths    ranks  contiguous     balanced       bound ms    tokens balanced filled ms", file=sys.stderr)
    for kind in LENGTHS:
        for ranks in options.ranks:
            rows.append(measure(kind, ranks, options))
            print(table_row(rows[-1]), file=sys.stderr)
    print(json.dumps({"options": vars(options), "machine": platform.processor() or platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
