"""One optimizer step on the table rows that have a gradient: formulas, interface and PyTorch reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowUpdate:
    """One optimizer step of a table. Rows without a gradient keep their weights and states.

    With g the gradient of a row, summed over its look-ups:

    - adam, at step t: m ← β1 m + (1 - β1) g, v ← β2 v + (1 - β2) g²,
      w ← w - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + ε)
    - partial_rowwise_adam: the same, with the mean of g² over the row in place of g², so that v is one number per row
    - adagrad: s ← s + g², w ← w - lr · g / (√s + ε)
    - rowwise_adagrad: the same, with the mean of g² over the row in place of g²
    - sgd: w ← w - lr · g

    adam and partial_rowwise_adam are FBGEMM's. torch.optim.SparseAdam adds ε to the uncorrected √v instead.
    """

    optimizer: Literal["adam", "partial_rowwise_adam", "adagrad", "rowwise_adagrad", "sgd"]
    learning_rate: float
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    step: int = 1
    """t, counted from 1."""
    max_gradient: float | None = None
    """Absolute value to which g is clamped; None: no limit."""


UpdateRows = Callable[[Tensor, Tensor, Sequence[Tensor], RowUpdate, Tensor | None], None]
"""Apply a :class:`RowUpdate` in place: (gradient, weight, states, update, found_inf).

gradient: sparse COO [rows, D] in which rows may repeat, or dense, where all-zero rows have no gradient.
Repeated rows are summed in order of occurrence, so that the bits do not depend on the position of a row.
weight: [rows, D]. states: m and v of adam, s of adagrad, none of sgd, each shaped as weight, but v of
partial_rowwise_adam and s of rowwise_adagrad: [rows].
found_inf: scalar on the device; if it is not 0, nothing changes.
"""


@torch.no_grad()
def update_rows(
    gradient: Tensor, weight: Tensor, states: Sequence[Tensor], update: RowUpdate, found_inf: Tensor | None = None
) -> None:
    """See :data:`UpdateRows`."""
    if not gradient.is_sparse:
        changes = gradient.ne(0).any(1, keepdim=True)
        if found_inf is not None:
            changes &= found_inf == 0
        new = _new_weight_and_states(gradient, weight, states, update)
        for tensor, value in zip((weight, *states), new, strict=True):
            tensor.copy_(torch.where(changes if tensor.dim() > 1 else changes[:, 0], value, tensor))
        return
    rows, values = sum_by_row(gradient)
    old = [tensor.index_select(0, rows) for tensor in (weight, *states)]
    new = _new_weight_and_states(values, old[0], old[1:], update)
    for tensor, before, value in zip((weight, *states), old, new, strict=True):
        tensor.index_copy_(0, rows, value if found_inf is None else torch.where(found_inf > 0, before, value))


def sum_by_row(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of a COO gradient, ascending, and their sums in order of occurrence, which ``coalesce`` loses."""
    rows, index = gradient._indices()[0].unique(return_inverse=True)
    values = gradient._values()
    return rows, add_rows(values.new_zeros((len(rows), *values.shape[1:])), index, values)


def add_rows(sums: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Add each of ``values`` to the row of ``sums`` at its ``index``, in order."""
    if sums.device.type == "cpu":
        return sums.index_add_(0, index, values)
    return sums.index_put_((index,), values, accumulate=True)  # sorts on GPUs, where index_add_ uses atomics


def _new_weight_and_states(g: Tensor, weight: Tensor, states: Sequence[Tensor], update: RowUpdate) -> list[Tensor]:
    if update.max_gradient is not None:
        g = g.clamp(-update.max_gradient, update.max_gradient)
    rate, eps = update.learning_rate, update.eps
    match update.optimizer:
        case "sgd":
            return [torch.add(weight, g, alpha=-rate)]
        case "rowwise_adagrad":
            total = states[0] + g.square().mean(1)
            return [torch.addcdiv(weight, g, total.sqrt().add_(eps)[:, None], value=-rate), total]
        case "adagrad":
            total = torch.addcmul(states[0], g, g)
            return [torch.addcdiv(weight, g, total.sqrt().add_(eps), value=-rate), total]
        case "adam" | "partial_rowwise_adam":
            (beta1, beta2), step = update.betas, update.step
            first = torch.lerp(states[0], g, 1 - beta1)
            if update.optimizer == "adam":
                second = (states[1] * beta2).addcmul_(g, g, value=1 - beta2)
            else:
                second = (states[1] * beta2).add_(g.square().mean(1), alpha=1 - beta2)
            deviation = (second / (1 - beta2**step)).sqrt_().add_(eps)
            deviation = deviation if second.dim() > 1 else deviation[:, None]
            return [torch.addcdiv(weight, first / (1 - beta1**step), deviation, value=-rate), first, second]
