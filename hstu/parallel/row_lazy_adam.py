"""Adam for tables: rows that a batch does not look up cost nothing and do not move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class RowLazyAdam(torch.optim.Optimizer):
    """FBGEMM's Adam (OptimType.ADAM without weight decay) on parameters with sparse row gradients.

    On the rows of the gradient alone, at step t counted over all steps of the optimizer:
        m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²
        w ← w - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + ε)
    The moments of the other rows do not decay. torch.optim.SparseAdam is not the same: it puts ε beside the
    uncorrected √v. Cost is proportional to the rows touched.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """``params``: parameters, or groups of them as torch.optim takes them.

        A group may have an ``lr`` of its own and a ``max_gradient``, to which the gradients of rows are clamped.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "max_gradient": None})
        self.steps = 0
        """Steps taken; part of the state to checkpoint."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the rows of each parameter's gradient (sparse COO; repeated rows are summed in their order)."""
        self.steps += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rows, values = _summed(parameter.grad)
                if group["max_gradient"] is not None:
                    values.clamp_(-group["max_gradient"], group["max_gradient"])
                state = self.state[parameter]
                first = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - beta1)
                second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2)
                second.addcmul_(values, values, value=1 - beta2)
                state["exp_avg"].index_copy_(0, rows, first)
                state["exp_avg_sq"].index_copy_(0, rows, second)
                update = first.div_(correction1).div_(second.div_(correction2).sqrt_().add_(group["eps"]))
                parameter.index_add_(0, rows, update, alpha=-group["lr"])


def _summed(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct rows, sums of their gradients).

    Unlike ``coalesce``, which sorts without care for order, it adds in the order in which rows occur: the bits do not
    depend on where in its table a row lies.
    """
    rows, place = gradient._indices()[0].unique(return_inverse=True)
    values = gradient._values()
    return rows, values.new_zeros((len(rows), *values.shape[1:])).index_add_(0, place, values)
