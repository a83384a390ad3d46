"""The optimizer of the dense part: everything but the sharded tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu.config.args import OptimizerArgs
from hstu.optim.parts import Settings

log = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class DenseOptimizer:
    """torch.optim with decoupled weight decay and state that exists from the start.

    Weight decay is w ← w - lr · weight_decay · w before the update, whichever the optimizer (adam with it is adamw),
    and only for weights of two or more dimensions that are no embedding and no norm. ``state`` keeps the names of
    the parameters, so that checkpoints do not depend on their order. With ``ema_decay`` it also keeps an exponential
    moving average of the parameters, which is part of its state.

    ``settings``: of the parameters, by name, that are trained otherwise than ``args`` says.
    """

    def __init__(self, module: nn.Module, args: OptimizerArgs, settings: Mapping[str, Settings] | None = None) -> None:
        self.parameters = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.learning_rate = args.learning_rate
        """Of the parameters that ``settings`` does not name."""
        self._parts = [*_parts(module, self.parameters, args, settings or {})]
        self.ema_decay = args.ema_decay
        averaged = self.parameters if args.ema_decay > 0 else {}
        self._averages = {name: weight.detach().clone() for name, weight in averaged.items()}

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Use each learning rate × multiplier from the next step on."""
        for part in self._parts:
            part.set_lr_multiplier(multiplier)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        """Decay, then update, all parameters."""
        for part in self._parts:
            part.step()
        if self._averages:
            weights: list[Tensor] = [self.parameters[name] for name in self._averages]
            torch._foreach_lerp_([*self._averages.values()], weights, 1.0 - self.ema_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the parameters have their averages as values; nothing happens where none are kept."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, average in self._averages.items():
            weight = self.parameters[name]
            weight.data, average.data = average.data, weight.data

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state: ``<parameter>.<state>`` → tensor."""
        kept = {parameter: state for part in self._parts for parameter, state in part.optimizer.state.items()}
        states = {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in kept.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return states | {f"{name}.average": average for name, average in self._averages.items()}


@dataclass(frozen=True)
class _Part:
    """The parameters that are trained alike."""

    settings: Settings
    optimizer: torch.optim.Optimizer
    decayed: list[Tensor]

    def set_lr_multiplier(self, multiplier: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * multiplier

    def step(self) -> None:
        if (limit := self.settings.max_gradient) is not None:
            for weight in self.optimizer.param_groups[0]["params"]:
                if weight.grad is not None:
                    weight.grad.clamp_(-limit, limit)
        if self.decayed:
            rate = self.optimizer.param_groups[0]["lr"]
            torch._foreach_mul_(self.decayed, 1.0 - rate * self.settings.weight_decay)
        self.optimizer.step()


def _parts(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], args: OptimizerArgs, settings: Mapping[str, Settings]
) -> Iterator[_Part]:
    common, decaying = Settings.of(args), {id(weight) for weight in decayed_parameters(module)}
    alike: dict[Settings, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        alike.setdefault(settings.get(name, common), []).append(parameter)
    for of_part, weights in alike.items():
        decayed: list[Tensor] = [w for w in weights if of_part.weight_decay > 0 and id(w) in decaying]
        part = _Part(of_part, _build(weights, of_part, args), decayed)
        _create_state(part.optimizer)
        yield part


def decayed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that weight decay applies to: two or more dimensions, neither an embedding's nor a norm's."""
    exempt = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, (nn.Embedding, *_NORMS))
        for parameter in child.parameters(recurse=False)
    }
    return [weight for weight in module.parameters() if weight.ndim >= 2 and id(weight) not in exempt]


def _build(parameters: list[nn.Parameter], settings: Settings, args: OptimizerArgs) -> torch.optim.Optimizer:
    rate = settings.learning_rate
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=args.momentum)
        case "adagrad" | "rowwise_adagrad":
            if settings.optimizer == "rowwise_adagrad":
                log.info("rowwise_adagrad is for tables; the dense part uses adagrad")
            return torch.optim.Adagrad(parameters, lr=rate, eps=args.adam_eps)
        case "adam" | "adamw":
            betas = (args.adam_beta1, args.adam_beta2)
            return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=args.adam_eps, fused=True)
    raise ValueError(f"unknown dense optimizer {settings.optimizer!r}")


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the lazily created state, equal to what the first step would start from.

    Without it a checkpoint could not be restored in place into a new optimizer: DCP silently loads nothing for
    state that is not there. A step with zero gradients at learning rate 0 changes no parameter and leaves zero
    moments (with momentum, a zero buffer gives the same next step as none); only the step counts need resetting.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
