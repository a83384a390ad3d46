"""Time forward + backward of the retrieval losses; one JSON object on standard output.

python scripts/bench/softmax_loss_cpu.py [--queries 13600 --pool 3700 --draws 128 --dim 50 --threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.softmax_loss import pool_softmax_loss, sampled_softmax_loss

TEMPERATURE = 0.05


def gathered_loss(
    queries: Tensor, positives: Tensor, pool: Tensor, draws: Tensor, target_ids: Tensor, pool_ids: Tensor
) -> Tensor:
    """What is usually written: gather [M, R, D], then cross entropy, gradients by autograd."""
    positive = (queries * positives).sum(dim=1, keepdim=True)
    negative = torch.bmm(F.embedding(draws, pool), queries[:, :, None]).squeeze(2)
    negative = negative.masked_fill(pool_ids[draws] == target_ids[:, None], -torch.inf)
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long), reduction="sum")


def milliseconds(loss: Callable[[], Tensor], leaves: list[Tensor], repeats: int) -> dict[str, float]:
    """Median and minimum over ``repeats`` runs of forward + backward, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.autograd.grad(loss(), leaves)
        times.append(1e3 * (time.perf_counter() - start))
    return {"median_ms": round(statistics.median(times[1:]), 1), "min_ms": round(min(times[1:]), 1)}


def main() -> None:
    """Run all losses on random data of the given shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=13600, help="queries M (labelled positions of a batch)")
    parser.add_argument("--pool", type=int, default=3700, help="rows S of the pool")
    parser.add_argument("--draws", type=int, default=128, help="negatives R a query")
    parser.add_argument("--dim", type=int, default=50, help="width D of the vectors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    shape = parser.parse_args()
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    queries, positives, pool = (
        F.normalize(torch.randn(rows, shape.dim), dim=1).requires_grad_()
        for rows in (shape.queries, shape.queries, shape.pool)
    )
    ids, targets = torch.arange(shape.pool), torch.randint(shape.pool, (shape.queries,))
    draws = torch.randint(shape.pool, (shape.queries, shape.draws), dtype=torch.int32)
    losses = {
        "sampled": lambda: sampled_softmax_loss(queries, positives, pool, draws, targets, ids, TEMPERATURE),
        "whole_pool": lambda: pool_softmax_loss(queries, positives, pool, targets, ids, None, TEMPERATURE),
        "gathered_baseline": lambda: gathered_loss(queries, positives, pool, draws, targets, ids),
    }
    timings = {name: milliseconds(loss, [queries, positives, pool], shape.repeats) for name, loss in losses.items()}
    print(json.dumps({"shape": vars(shape), "torch": torch.__version__, "forward_backward": timings}))


if __name__ == "__main__":
    main()
