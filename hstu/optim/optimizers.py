"""Combines the dense and table optimizers of a run, and defines the schedule of their learning rates."""

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hstu.config.args import LRScheduleArgs, OptimizerArgs
from hstu.model.gr_model import GRModel
from hstu.optim.dense import DenseOptimizer
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import clip_grad_norm, gradient_norm
from hstu.parallel.table_optimizer import TableOptimizer


class Optimizers:
    """The dense optimizer and the table optimizer, each driven by a learning-rate multiplier.

    A step: zero_grad, forward, backward (which updates fused tables), clip_grad_norm, step. A checkpoint has the
    ``state_tensors`` of both, which it restores in place, and the ``counters``.
    """

    def __init__(
        self, dense: DenseOptimizer, tables: TableOptimizer, tp_group: dist.ProcessGroup | None = None
    ) -> None:
        self.dense = dense
        self.tables = tables
        self.tp_group = tp_group
        """The group over which dense parameters are sharded, if any."""
        self.lr_multiplier = 1.0

    def set_lr_multiplier(self, multiplier: float, of_tables: float | None = None) -> None:
        """Multiply every learning rate from the next backward on. ``of_tables``: that of tables; None: ``multiplier``.

        A checkpoint has only ``multiplier``: the trainer sets both before each step.
        """
        self.lr_multiplier = multiplier
        self.dense.set_lr_multiplier(multiplier)
        self.tables.set_lr_multiplier(multiplier if of_tables is None else of_tables)

    @property
    def learning_rate(self) -> float:
        """The current dense learning rate."""
        return self.dense.learning_rate * self.lr_multiplier

    def zero_grad(self) -> None:
        """Drop the gradients. Call it before a training step looks up rows."""
        self.dense.zero_grad()
        self.tables.zero_grad()

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of the dense weights, without tables; a scalar on the device. Collective."""
        return gradient_norm(self.dense.trained.values(), self.tp_group)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the global L2 norm of dense gradients; returns the norm before. Collective if weights are sharded."""
        return clip_grad_norm(self.dense.parameters.values(), max_norm, self.tp_group)

    def step(self, found_inf: Tensor | None = None) -> None:
        """Update weights that backward did not update, and the average. ``found_inf``: see DenseOptimizer.step."""
        self.dense.step(found_inf)
        self.tables.step(found_inf)

    def counters(self) -> dict[str, Any]:
        """State other than tensors."""
        return {"table_steps": self.tables.steps, "lr_multiplier": self.lr_multiplier}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore ``counters``."""
        self.tables.steps = self.dense.steps = counters["table_steps"]
        self.set_lr_multiplier(counters["lr_multiplier"])


def build_optimizers(model: GRModel, args: OptimizerArgs, tables: TableOptimizer, mesh: Mesh) -> Optimizers:
    """Build the optimizers of a model with sharded tables, whose dense part may use TP and DDP or FSDP.

    Raises ConfigError if OptimizerArgs.part_optimizers do not fit the weights.
    """
    dense = DenseOptimizer(unwrap_dense(model), args)
    return Optimizers(dense, tables, mesh.tp_group if mesh.tp_size > 1 else None)


def lr_multiplier(args: LRScheduleArgs, iteration: int, total_iters: int, epoch: int, epoch_start: int) -> float:
    """Multiplier of the schedule for the step that starts at ``iteration`` of ``total_iters``, in ``epoch``.

    Warm-up is linear from warmup_start at iteration 0 to 1 at the first iteration after it; then the decay starts,
    that of warmup_stable_decay as late as it can to end with the run.
    With by_epoch, all steps of an epoch use the multiplier of its first iteration, ``epoch_start``.
    Iterations and epochs count from 0.
    """
    position = epoch_start if args.by_epoch else iteration
    warmup = (args.warmup_iters or 0) if args.warmup_ratio is None else round(args.warmup_ratio * total_iters)
    if position < warmup:
        return args.warmup_start + (1.0 - args.warmup_start) * position / warmup
    decay_iters = args.decay_iters or max(1, total_iters - warmup)
    if args.decay_ratio is not None:
        decay_iters = max(1, round(args.decay_ratio * total_iters))
    begin, floor = warmup, args.min_ratio
    if args.schedule == "warmup_stable_decay":
        begin = max(warmup, total_iters - decay_iters)
        decay_iters = max(1, total_iters - begin)
    elapsed = position - begin
    progress = min(1.0, max(0.0, elapsed / decay_iters))
    match args.schedule:
        case "step":
            passed = sum((epoch if args.by_epoch else iteration) >= milestone for milestone in args.milestones)
            return max(floor, args.decay_factor**passed)
        case "linear" | "warmup_stable_decay":
            return 1.0 - (1.0 - floor) * progress
        case "cosine":
            return _cosine(progress, floor)
        case "cosine_restarts":
            return _cosine(elapsed % decay_iters / decay_iters, floor)
        case "exponential":
            return max(floor, args.decay_factor**progress)
    return 1.0


def _cosine(progress: float, floor: float) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
