"""Optimizers of tables in plain PyTorch, on any device: only rows that have a gradient change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu.ops.row_update import RowUpdate


@torch.no_grad()
def update_rows(
    gradient: Tensor, weight: Tensor, states: Sequence[Tensor], update: RowUpdate, found_inf: Tensor | None = None
) -> None:
    """See :class:`hstu.ops.row_update.UpdateRows`."""
    if not gradient.is_sparse:
        changes = gradient.ne(0).any(1, keepdim=True)
        new = _updated(gradient, weight, states, update)
        for tensor, value in zip((weight, *states), new, strict=True):
            tensor.copy_(torch.where(_unless(found_inf, changes), value, tensor))
        return
    rows, values = sum_by_row(gradient)
    old = [tensor.index_select(0, rows) for tensor in (weight, *states)]
    new = _updated(values, old[0], old[1:], update)
    for tensor, before, value in zip((weight, *states), old, new, strict=True):
        tensor.index_copy_(0, rows, value if found_inf is None else torch.where(found_inf > 0, before, value))


def sum_by_row(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct rows in ascending order, sums of their gradients) of a sparse COO gradient.

    Sums are taken in the order in which rows occur. ``coalesce`` sorts without keeping that order.
    """
    rows, index = gradient._indices()[0].unique(return_inverse=True)
    values = gradient._values()
    return rows, values.new_zeros((len(rows), *values.shape[1:])).index_add_(0, index, values)


def _unless(found_inf: Tensor | None, changes: Tensor) -> Tensor:
    return changes if found_inf is None else changes & (found_inf == 0)


def _updated(g: Tensor, weight: Tensor, states: Sequence[Tensor], update: RowUpdate) -> list[Tensor]:
    """New weight and states."""
    if update.max_gradient is not None:
        g = g.clamp(-update.max_gradient, update.max_gradient)
    rate, eps = update.learning_rate, update.eps
    match update.optimizer:
        case "sgd":
            return [torch.add(weight, g, alpha=-rate)]
        case "adagrad":
            total = torch.addcmul(states[0], g, g)
            return [torch.addcdiv(weight, g, total.sqrt().add_(eps), value=-rate), total]
        case "adam":
            (beta1, beta2), step = update.betas, update.step
            first = torch.lerp(states[0], g, 1 - beta1)
            second = (states[1] * beta2).addcmul_(g, g, value=1 - beta2)
            deviation = (second / (1 - beta2**step)).sqrt_().add_(eps)
            return [torch.addcdiv(weight, first / (1 - beta1**step), deviation, value=-rate), first, second]
