"""How each table is trained: its optimizer, its learning rate, and what the optimizer keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType

from hstu.config.args import OptimizerArgs
from hstu.model.embedding import TableSpec

STATES = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("rowwise_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
"""Optimizer → what it keeps of a table, in the names of torch.optim: [rows, columns] numbers; rowwise_…: one a row."""
# No weight decay is passed on: adamw on tables is adam.
_FUSED_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "adamw": EmbOptimType.ADAM,
}


def is_of_rows(state: str) -> bool:
    """Whether an optimizer keeps one number a row in it."""
    return state.startswith("rowwise_")


@dataclass(frozen=True)
class TableTraining:
    """The training of one sharded table."""

    optimizer: str
    """One of STATES."""
    learning_rate: float
    """Peak learning rate."""
    max_gradient: float | None = None
    """To what gradients of rows are clamped."""

    @classmethod
    def of(cls, spec: TableSpec, args: OptimizerArgs) -> TableTraining:
        """What EmbeddingArgs says of the table, else OptimizerArgs of all tables (sparse_*), else of everything."""
        return cls(
            spec.optimizer or args.sparse_optimizer_str or args.optimizer_str,
            spec.learning_rate or args.sparse_learning_rate or args.learning_rate,
            args.sparse_max_gradient,
        )

    @property
    def states(self) -> tuple[str, ...]:
        """What the optimizer keeps of the table."""
        return STATES[self.optimizer]

    def is_row_sparse(self, device_type: str) -> bool:
        """Whether the table's gradients leave the lookup as sparse rows, for an optimizer of our own."""
        return self.optimizer in ("adam", "adamw") and device_type == "cpu"

    def needs_own_kernel(self, device_type: str) -> bool:
        """Whether TorchRec has no kernel that trains the table so."""
        return self.is_row_sparse(device_type) or self.max_gradient is not None

    def fused_params(self, args: OptimizerArgs) -> dict[str, Any]:
        """The same in the words of FBGEMM."""
        params: dict[str, Any] = {
            "optimizer": _FUSED_OPTIMIZERS[self.optimizer],
            "learning_rate": self.learning_rate,
        }
        if self.optimizer != "sgd":
            params["eps"] = args.adam_eps
        if self.optimizer in ("adam", "adamw"):
            params |= {"beta1": args.adam_beta1, "beta2": args.adam_beta2}
        if self.max_gradient is not None:
            params["max_gradient"] = self.max_gradient  # for ClampedFusedEmbedding
        return params
