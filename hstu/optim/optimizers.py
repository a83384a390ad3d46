"""The dense and table optimizers of a run, and the schedule of their learning rates.

The dense part is all weights except tables. Its moving average includes the replicated tables.
"""

import logging
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu.base.errors import ConfigError
from hstu.config.args import LRScheduleArgs, OptimizerArgs, PartOptimizerArgs
from hstu.config.args.optimizer import OF_MATRICES, ROWWISE
from hstu.config.option import located
from hstu.model.embedding import ReplicatedTables
from hstu.model.gr_model import GRModel
from hstu.parallel.data_parallel import FsdpWeights, fully_sharded, unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView, clip_grad_norm, gradient_norm, swap_values
from hstu.parallel.table_optimizer import TableOptimizer

log = logging.getLogger(__name__)

_SETTINGS = "optimizer_str", "learning_rate", "weight_decay"


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer settings of one weight."""

    optimizer: str
    """A value of OptimizerArgs.optimizer_str; an optimizer of tables means the one that ROWWISE gives."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """As configured; applies only to ``decayed_parameters``."""

    @classmethod
    def of(cls, args: OptimizerArgs, part: PartOptimizerArgs | None = None) -> Self:
        """Settings of ``part``; ``args`` supplies values that ``part`` omits."""
        given = {name: getattr(part, name, None) for name in _SETTINGS}
        return cls(*(getattr(args, name) if value is None else value for name, value in given.items()))


class DenseOptimizer:
    """torch.optim optimizers with decoupled weight decay, and state that exists from the start, named by parameter.

    Every optimizer first decays ``decayed_parameters``: w ← w - lr · weight_decay · w. With ``ema_decay``, the state
    includes a moving average of the parameters, which include the replicated tables that hstu.parallel trains.

    Of parameters that ``shard_dense`` has sharded, each rank updates its own rows.
    Raises ConfigError if OptimizerArgs.part_optimizers do not fit the parameters.
    """

    def __init__(self, module: nn.Module, args: OptimizerArgs) -> None:
        self.parameters = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.learning_rate = args.learning_rate
        """Peak learning rate of parameters that no PartOptimizerArgs has another one for."""
        parts = [part for part in module.modules() if isinstance(part, ReplicatedTables)]
        tables = {id(weight) for part in parts for weight in part.parameters()}
        self.trained = trained = {name: weight for name, weight in self.parameters.items() if id(weight) not in tables}
        """The parameters without the replicated tables."""
        sharded = fully_sharded(module)
        self._shares = None if sharded is None else FsdpWeights(trained, sharded)
        self._owned = trained if self._shares is None else self._shares.own
        """This rank's slice of each trained parameter."""
        decaying = {id(weight) for weight in decayed_parameters(module)}
        settings = match_part_optimizers(trained, args)
        for name, weight in trained.items():
            is_matrix = weight.ndim == 2 and id(weight) in decaying and not name.endswith("table")  # looked up
            if not is_matrix and (other := OF_MATRICES.get(settings[name].optimizer)):
                settings[name] = replace(settings[name], optimizer=other)
        by_settings: dict[OptimizerSettings, dict[str, nn.Parameter]] = {}
        for name, owned in self._owned.items():
            by_settings.setdefault(settings[name], {})[name] = owned
        self._groups = [
            _ParameterGroup(
                own_settings,
                _build([*weights.values()], own_settings, args),
                [w for name, w in weights.items() if own_settings.weight_decay > 0 and id(trained[name]) in decaying],
            )
            for own_settings, weights in by_settings.items()
        ]
        self.ema_decay = args.ema_decay
        self.steps = 0
        """Steps taken. Forms the whole state with ``state_tensors``; a restore sets it."""
        self._averaged = self.parameters | self._owned if args.ema_decay > 0 else {}
        self._averages = {name: weight.detach().clone() for name, weight in self._averaged.items()}

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Multiply each learning rate from the next step on."""
        for group in self._groups:
            group.set_lr_multiplier(multiplier)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self._groups:
            group.optimizer.zero_grad(set_to_none=True)
        if self._shares is not None:
            self._shares.zero_grad()

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        """Apply weight decay, then the updates, then the moving average.

        ``found_inf``: float32 scalar on the device, as in torch.amp. If it is not 0, only ``steps`` changes.
        """
        if self._shares is not None:
            self._shares.take_gradients()
        for group in self._groups:
            group.step(found_inf)
        self._update_averages(found_inf)
        self.steps += 1

    def _update_averages(self, found_inf: Tensor | None) -> None:
        if not self._averages:
            return
        # Warm-up of TensorFlow's ExponentialMovingAverage(num_updates): a constant decay of 0.995 would leave 22 %
        # of the initial weights in the average after 300 steps.
        change = 1.0 - min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        averages: list[Tensor] = [*self._averages.values()]
        weights: list[Tensor] = [*self._averaged.values()]
        if found_inf is None:
            torch._foreach_lerp_(averages, weights, change)
        else:
            torch._foreach_lerp_(averages, weights, [torch.where(found_inf > 0, 0.0, change)] * len(averages))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which parameters have their averages as values, if averages exist.

        If ranks share parameters, entering is collective, and submodules of a sharded model can be called inside.
        """
        shared = {} if self._shares is None else self._shares.own
        whole = {name: average for name, average in self._averages.items() if name not in shared}
        owned = {name: average for name, average in self._averages.items() if name in shared}
        swap_values(self.parameters, whole)
        try:
            with nullcontext() if self._shares is None else self._shares.lend(owned):
                yield
        finally:
            swap_values(self.parameters, whole)

    def state_tensors(self) -> dict[str, Tensor | ShardedView]:
        """The live state: ``<parameter>.<state>`` → tensor of the parameter's size, or a scalar."""
        state = {parameter: kept for group in self._groups for parameter, kept in group.optimizer.state.items()}
        states = {
            f"{name}.{key}": self._whole(name, value)
            for name, owned in self._owned.items()
            for key, value in state.get(owned, {}).items()
            if isinstance(value, Tensor)
        }
        return states | {f"{name}.average": self._whole(name, average) for name, average in self._averages.items()}

    def _whole(self, name: str, state: Tensor) -> Tensor | ShardedView:
        if self._shares is None or name not in self._owned or state.ndim == 0:
            return state
        return self._shares.view(name, state)


@dataclass(eq=False)
class Optimizers:
    """The dense optimizer and the table optimizer, each driven by a learning-rate multiplier.

    A step: zero_grad, forward, backward (which updates fused tables), clip_grad_norm, step. A checkpoint has the
    ``state_tensors`` of both, which it restores in place, and the ``counters``.
    """

    dense: DenseOptimizer
    tables: TableOptimizer
    tp_group: dist.ProcessGroup | None
    """The group over which dense parameters are sharded, if any."""
    lr_multiplier: float = 1.0

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


@dataclass(frozen=True)
class _ParameterGroup:
    settings: OptimizerSettings
    optimizer: torch.optim.Optimizer
    decayed: list[Tensor]

    def __post_init__(self) -> None:
        """Create the state that torch creates in the first step, because DCP silently skips missing state.

        A step with zero gradients at learning rate 0 keeps parameters and moments; only step counts need resetting.
        """
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        self.set_lr_multiplier(0.0)
        self.optimizer.step()
        self.set_lr_multiplier(1.0)
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()

    def set_lr_multiplier(self, multiplier: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * multiplier

    def step(self, found_inf: Tensor | None) -> None:
        if self.decayed:
            factor = 1.0 - self.optimizer.param_groups[0]["lr"] * self.settings.weight_decay
            torch._foreach_mul_(self.decayed, factor if found_inf is None else torch.where(found_inf > 0, 1.0, factor))
        if isinstance(self.optimizer, torch.optim.Muon) and found_inf is not None and found_inf.item() > 0:
            return  # the host waits, as in torch.amp.GradScaler: only torch's fused optimizers read found_inf
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()


def decayed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that weight decay applies to: at least two dimensions, neither an embedding nor a norm."""
    exempt = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
        for parameter in child.parameters(recurse=False)
    }
    return [weight for weight in module.parameters() if weight.ndim >= 2 and id(weight) not in exempt]


def _build(parameters: list[nn.Parameter], settings: OptimizerSettings, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Fused where torch can, because only its fused optimizers support ``found_inf``."""
    rate = settings.learning_rate
    name = ROWWISE.get(settings.optimizer, settings.optimizer)
    if name != settings.optimizer:
        log.info("%s is for tables; the dense part uses %s", settings.optimizer, name)
    match name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=args.momentum, fused=True)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=rate, eps=args.adam_eps, fused=True)
        case "adam" | "adamw":
            betas = (args.adam_beta1, args.adam_beta2)
            return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=args.adam_eps, fused=True)
        case "muon":
            return torch.optim.Muon(parameters, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    raise ValueError(f"unknown dense optimizer {settings.optimizer!r}")


def match_part_optimizers(names: Collection[str], args: OptimizerArgs) -> dict[str, OptimizerSettings]:
    """Settings of each weight, from its first match in part_optimizers. Raises ConfigError for unmatched entries."""
    settings: dict[str, OptimizerSettings] = {}
    problems = []
    for part in args.part_optimizers:
        own = [name for name in names if name not in settings and re.search(part.regex, name)]
        settings |= dict.fromkeys(own, OptimizerSettings.of(args, part))
        if not own:
            known = dict.fromkeys(re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in names)
            text = f"matches no dense weight that the entries before it have left. There are {', '.join(known)}"
            problems.append(located(part, "regex", text))
    ConfigError.raise_if(problems)
    others = OptimizerSettings.of(args)
    return {name: settings.get(name, others) for name in names}
