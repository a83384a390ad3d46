"""Time the sampled softmax loss beside the usual code in PyTorch, the same compiled, and FBGEMM's gather.

    python scripts/bench/negatives.py [--device cuda] [--output docs/benchmarks/negatives/cpu.json]

The timed part begins with vectors that are not yet normalised and ends with the loss and its gradients, at the shape of
ML-1M retrieval: 13,600 labelled positions with 128 uniform negatives each, drawn from 3,700 items of width 50. The
usual code gathers the negatives [M, R, D], normalises them and multiplies. "normalised first" normalises the items
before the gather. Operations are those of the scores, 6 · M · R · D for forward and backward together, because our
forward already computes the gradients. "whole pool" scores all 3,700 items at all positions, and counts those.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F
from attention import BACKENDS, LABELS, kernels_of
from harness import Pass, begin, compiled, finish, operator_command_line, rate, runnable, time_passes
from padded_baseline import gathered_loss
from torch import Tensor

from hstu.ops.costs import sampled_softmax
from hstu.ops.functional import pool_softmax_loss, sampled_softmax_loss
from hstu.ops.kernels import Backend, Kernels

TEMPERATURE, EPS = 0.05, 1e-6


class Bench:
    """Random vectors and draws, and the variants of the loss."""

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
        """``loss`` and its gradients with respect to all vectors."""
        return Pass(loss, [self.queries, self.positives, self.items])

    def sampled(self, backend: Backend) -> Tensor:
        """Our sampled softmax."""
        kernels = kernels_of(backend, self.items.shape[1])
        loss = sampled_softmax_loss(
            *self._units(kernels),
            self.short_draws,
            self.targets,
            self.ids,
            None,
            TEMPERATURE,
            kernels.sampled_softmax_loss,
        )
        return loss / len(self.queries)

    def whole_pool(self, backend: Backend) -> Tensor:
        """Our softmax over the whole pool."""
        kernels = kernels_of(backend, self.items.shape[1])
        loss = pool_softmax_loss(
            *self._units(kernels), self.targets, self.ids, None, TEMPERATURE, kernels.pool_softmax_loss
        )
        return loss / len(self.queries)

    def _units(self, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
        queries, positives, items = (kernels.l2_normalize(x, EPS) for x in (self.queries, self.positives, self.items))
        return queries, positives, items

    def gathered(self, loss: Callable[..., Tensor]) -> Tensor:
        """The usual code."""
        hit = self.draws == self.targets[:, None]
        return loss(self.queries, self.positives, F.embedding(self.draws, self.items), hit, TEMPERATURE, EPS)

    def normalised_first(self, gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The usual code with items that are normalised before ``gather(items, flat draws)``."""
        queries, positives, items = (F.normalize(x, dim=1) for x in (self.queries, self.positives, self.items))
        negatives = gather(items, self.draws.flatten()).view(*self.draws.shape, -1)
        scores = torch.bmm(negatives, queries[:, :, None]).squeeze(2)
        scores = scores.masked_fill(self.draws == self.targets[:, None], -torch.inf)
        logits = torch.cat([(queries * positives).sum(1, keepdim=True), scores], dim=1) / TEMPERATURE
        return -F.log_softmax(logits, dim=1)[:, 0].mean()


def passes_of(options: argparse.Namespace, device: torch.device) -> dict[str, Pass]:
    """All variants on the same vectors."""
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
    add = (commands := operator_command_line(__doc__)).add_argument
    add("--queries", type=int, default=13_600, help="labelled positions M")
    add("--pool", type=int, default=3_700, help="items S")
    add("--draws", type=int, default=128, help="negatives R per position")
    add("--dim", type=int, default=50, help="width D")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    # FBGEMM implements the gradient of its gather below autograd, so torch warns. A test checks the gradient.
    warnings.filterwarnings("ignore", message="fbgemm::index_select_dim0")
    passes, rows = runnable(passes_of(options, device))
    losses = {name: float(each.forward().detach()) for name, each in passes.items()}
    for name, times in time_passes(passes, device, options.rounds).items():
        scored = options.pool if name == "ours, whole pool" else options.draws
        operations = sampled_softmax(options.queries, scored, options.dim).flops
        rows.append({"variant": name, "loss": losses[name], **times, **rate(times, operations, "gflops")})
    shape = {name: getattr(options, name) for name in ("queries", "pool", "draws", "dim")}
    finish(report | shape | {"losses": rows}, options)


if __name__ == "__main__":
    main()
