"""Time the sampled softmax loss beside what is usually written, that compiled, and FBGEMM's gather.

    python scripts/bench/negatives.py [--device cuda] [--output docs/benchmarks/negatives/cpu.json]

From vectors before they are normalised to the loss, and back, at the shape of ML-1M retrieval: 13,600 labelled
positions with 128 uniform negatives each, drawn from 3,700 items of width 50. Usual is to gather the negatives
[M, R, D], normalise them and multiply; "normalised first" normalises the items before. Operations are those of the
scores, 6 · M · R · D forward and backward (ours has computed its gradients when forward returns); "whole pool" scores
all items for all positions, 3,700 instead of 128, and counts those.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from attention import BACKENDS, LABELS
from padded_baseline import gathered_loss
from timing import Pass, begin, compiled, finish, parser, rate, time_passes

from hstu.ops.backends import Backend
from hstu.ops.normalise import l2_normalise
from hstu.ops.softmax_loss import pool_softmax_loss, sampled_softmax_loss

TEMPERATURE, EPS = 0.05, 1e-6


class Bench:
    """Random vectors and draws, and the losses of them."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.queries, self.positives, self.items = (
            torch.randn(rows, options.dim, device=device).requires_grad_()
            for rows in (options.queries, options.queries, options.pool)
        )
        self.ids = torch.arange(options.pool, device=device)
        self.targets = torch.randint(options.pool, (options.queries,), device=device)
        self.draws = torch.randint(options.pool, (options.queries, options.draws), device=device)
        self.short_draws = self.draws.int()

    def of(self, loss: Callable[[], Tensor]) -> Pass:
        """``loss``, to be differentiated by all vectors."""
        return Pass(loss, [self.queries, self.positives, self.items])

    def sampled(self, backend: Backend) -> Tensor:
        """Ours."""
        vectors = [l2_normalise(x, EPS, backend) for x in (self.queries, self.positives, self.items)]
        loss = sampled_softmax_loss(*vectors, self.short_draws, self.targets, self.ids, TEMPERATURE, backend)
        return loss / len(self.queries)

    def whole_pool(self, backend: Backend) -> Tensor:
        """Ours against all items."""
        vectors = [l2_normalise(x, EPS, backend) for x in (self.queries, self.positives, self.items)]
        return pool_softmax_loss(*vectors, self.targets, self.ids, None, TEMPERATURE, backend) / len(self.queries)

    def gathered(self, loss: Callable[..., Tensor]) -> Tensor:
        """The usual way, from the gather on."""
        hit = self.draws == self.targets[:, None]
        return loss(self.queries, self.positives, F.embedding(self.draws, self.items), hit, TEMPERATURE, EPS)

    def normalised_first(self, gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The usual way with normalised items, gathered by ``gather`` of items and flat draws."""
        queries, positives, items = (F.normalize(x, dim=1) for x in (self.queries, self.positives, self.items))
        negatives = gather(items, self.draws.flatten()).view(*self.draws.shape, -1)
        scores = torch.bmm(negatives, queries[:, :, None]).squeeze(2)
        scores = scores.masked_fill(self.draws == self.targets[:, None], -torch.inf)
        logits = torch.cat([(queries * positives).sum(1, keepdim=True), scores], dim=1) / TEMPERATURE
        return -F.log_softmax(logits, dim=1)[:, 0].mean()


def passes_of(options: argparse.Namespace, device: torch.device) -> dict[str, Pass]:
    """All losses, of the same vectors."""
    bench = Bench(options, device)
    passes = {}
    for backend in BACKENDS[device.type]:
        name = LABELS.get(backend, f"ours, {backend.value}")
        passes[name] = bench.of(lambda b=backend: bench.sampled(b))  # type: ignore[misc]
    passes["ours, whole pool"] = bench.of(lambda: bench.whole_pool(BACKENDS[device.type][0]))
    passes["gathered, normalised"] = bench.of(lambda: bench.gathered(gathered_loss))
    if options.compile:
        quick = compiled(gathered_loss)
        passes["gathered, normalised, compiled"] = bench.of(lambda: bench.gathered(quick))
    passes["normalised first, gathered"] = bench.of(
        lambda: bench.normalised_first(lambda items, rows: F.embedding(rows, items))
    )
    passes["normalised first, FBGEMM's gather"] = bench.of(
        lambda: bench.normalised_first(torch.ops.fbgemm.index_select_dim0)
    )
    return passes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    add = (commands := parser(__doc__)).add_argument
    add("--queries", type=int, default=13_600, help="labelled positions M")
    add("--pool", type=int, default=3_700, help="items S")
    add("--draws", type=int, default=128, help="negatives R a position")
    add("--dim", type=int, default=50, help="width D")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    # FBGEMM's gather has its gradient below autograd, which torch warns of. That it is right is checked in the tests.
    warnings.filterwarnings("ignore", message="fbgemm::index_select_dim0")
    passes = passes_of(options, device)
    losses = {name: float(each.forward().detach()) for name, each in passes.items()}
    rows = []
    for name, times in time_passes(passes, device, options.rounds).items():
        scored = options.pool if name == "ours, whole pool" else options.draws
        operations = 6.0 * options.queries * scored * options.dim
        rows.append({"variant": name, "loss": losses[name], **times, **rate(times, operations, "gflops")})
    shape = {name: getattr(options, name) for name in ("queries", "pool", "draws", "dim")}
    finish(report | shape | {"losses": rows}, options)


if __name__ == "__main__":
    main()
