"""The optimizer of tables whose rows leave the lookup with gradients: only rows that have a gradient change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import RowUpdate, UpdateRows

STATES = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("rowwise_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
"""Optimizer → names of its states, as in torch.optim: float32 [rows, columns]; ``rowwise_…``: float32 [rows]."""
# adamw equals adam on tables: no weight decay is passed on.


class RowOptimizer(torch.optim.Optimizer):
    """:class:`hstu.ops.row_update.RowUpdate` of parameters [rows, D]; t is counted over all steps of the optimizer."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        update_rows: UpdateRows = REFERENCE_KERNELS.update_rows,
    ) -> None:
        """``groups``: as in torch.optim, with ``lr``, and if they differ from these defaults:

        ``optimizer``: adam; ``max_gradient``: None, or the absolute value to which gradients of rows are clamped.
        """
        super().__init__(groups, {"optimizer": "adam", "max_gradient": None})
        self.steps = 0
        """Steps taken; part of the state to checkpoint."""
        self._betas, self._eps, self._update_rows = betas, eps, update_rows
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {state: torch.zeros_like(parameter) for state in STATES[group["optimizer"]]}

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient. ``found_inf``: see :class:`hstu.ops.row_update.UpdateRows`."""
        self.steps += 1
        for group in self.param_groups:
            update = RowUpdate(
                optimizer="adam" if group["optimizer"] == "adamw" else group["optimizer"],
                learning_rate=group["lr"],
                eps=self._eps,
                betas=self._betas,
                step=self.steps,
                max_gradient=group["max_gradient"],
            )
            for parameter in group["params"]:
                if parameter.grad is not None:
                    states = tuple(self.state[parameter].values())
                    self._update_rows(parameter.grad, parameter, states, update, found_inf)

    def states_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The live states of a parameter by name."""
        states: dict[str, Tensor] = self.state[parameter]
        return states
