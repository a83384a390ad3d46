"""One optimizer step of a table, on the rows that have a gradient: the formulas, and the interface of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class RowUpdate:
    """One step of the optimizer of a table, for the rows that have a gradient. Other rows keep weights and states.

    With g the gradient of a row, summed over its look-ups:

    - adam, at step t: m ← β1 m + (1 - β1) g, v ← β2 v + (1 - β2) g²,
      w ← w - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + ε)
    - adagrad: s ← s + g², w ← w - lr · g / (√s + ε)
    - sgd: w ← w - lr · g

    adam is FBGEMM's (OptimType.ADAM without weight decay). torch.optim.SparseAdam differs: it adds ε to the uncorrected
    √v.
    """

    optimizer: Literal["adam", "adagrad", "sgd"]
    learning_rate: float
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    step: int = 1
    """t, counted from 1."""
    max_gradient: float | None = None
    """Absolute value to which g is clamped."""


class UpdateRows(Protocol):
    """Apply a :class:`RowUpdate` in place."""

    def __call__(
        self,
        gradient: Tensor,
        weight: Tensor,
        states: Sequence[Tensor],
        update: RowUpdate,
        found_inf: Tensor | None = None,
    ) -> None:
        """weight: [rows, D]; states: m and v of adam, s of adagrad, none of sgd, each as weight.

        gradient: sparse COO [rows, D] in which rows may repeat, or dense, where rows of zeros have no gradient.
        Repeated rows are summed in the order in which they occur, so the bits do not depend on the place of a row.
        ``found_inf``: scalar on the device; where it is not 0, nothing changes.
        """
