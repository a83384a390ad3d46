"""Optimizer and learning rate of each table, behind one optimizer for all tables.

TorchRec's fused optimizers update rows inside backward. RowOptimizer updates, in ``step``, the rows of replicated
tables, and of sharded tables with Adam on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from hstu.config.args import OptimizerArgs
from hstu.model.embedding import TableSpec
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import RowUpdate, UpdateRows
from hstu.parallel.table_kernels import RowSparseEmbedding

STATES = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("rowwise_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
"""Optimizer → names of its states in torch.optim: float32 [rows, columns], or float32 [rows] for ``rowwise_…``."""
# adamw equals adam on tables, because they get no weight decay.
_FUSED_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "adamw": EmbOptimType.ADAM,
}


def is_rowwise(state: str) -> bool:
    """Return whether an optimizer state has one number per row."""
    return state.startswith("rowwise_")


def state_shape(spec: TableSpec, state: str) -> tuple[int, ...]:
    """Return the shape of an optimizer state of a whole static table."""
    return (spec.rows,) if is_rowwise(state) else (spec.rows, spec.dim)


@dataclass(frozen=True)
class TableTraining:
    """How one table is trained."""

    optimizer: str
    """A key of STATES."""
    learning_rate: float
    max_gradient: float | None = None
    """Row gradients are clamped to ± this value."""

    @classmethod
    def of(cls, spec: TableSpec, args: OptimizerArgs) -> TableTraining:
        """Read the table's own options; else OptimizerArgs.sparse_* if sharded; else the options of the dense model."""
        optimizer, rate = args.sparse_optimizer_str, args.sparse_learning_rate
        if spec.replicated:
            optimizer = rate = None
        optimizer = spec.optimizer or optimizer or args.optimizer_str
        if spec.replicated and optimizer == "rowwise_adagrad":
            optimizer = "adagrad"
        return cls(optimizer, spec.learning_rate or rate or args.learning_rate, args.sparse_max_gradient)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the optimizer states."""
        return STATES[self.optimizer]

    def is_row_sparse(self, device_type: str) -> bool:
        """Return whether RowOptimizer trains the sharded table, from sparse gradients."""
        return self.optimizer in ("adam", "adamw") and device_type == "cpu"

    def fused_params(self, args: OptimizerArgs) -> dict[str, Any]:
        """Return the training as keyword arguments of FBGEMM's tables."""
        params: dict[str, Any] = {"optimizer": _FUSED_OPTIMIZERS[self.optimizer], "learning_rate": self.learning_rate}
        if self.optimizer != "sgd":
            params["eps"] = args.adam_eps
        if self.optimizer in ("adam", "adamw"):
            params |= {"beta1": args.adam_beta1, "beta2": args.adam_beta2}
        if self.max_gradient is not None:
            params["max_gradient"] = self.max_gradient  # for ClampedFusedEmbedding
        return params


class TableOptimizer:
    """Optimizer of all tables of a model.

    TorchRec's fused optimizers read the learning rate only in zero_grad and step, and their Adam (CUDA) counts forward
    calls, including evaluation, as steps. Learning rate and step count are therefore set before each training step.
    """

    def __init__(
        self,
        collections: Sequence[ShardedEmbeddingCollection],
        training: Mapping[str, TableTraining],
        args: OptimizerArgs,
        replicated: Mapping[str, nn.Parameter],
        update_rows: UpdateRows = REFERENCE_KERNELS.update_rows,
    ) -> None:
        """``training`` by table name, including tables without a shard here; ``replicated``: table name → weight."""
        self.training = training
        self._fused = [opt for collection in collections for _, opt in collection.fused_optimizer.optimizers]
        lookups = [lookup for collection in collections for lookup in collection._lookups]
        modules = [module for lookup in lookups for module in lookup.modules()]
        self._fused_kernels = [m for m in modules if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
        self._sparse_kernels = [m for m in modules if isinstance(m, RowSparseEmbedding)]
        self._replicated = list(replicated)
        own = [pair for kernel in self._sparse_kernels for pair in kernel.named_parameters_by_table()]
        self._by_row = RowOptimizer(dict([*own, *replicated.items()]), training, args, update_rows)

    @property
    def steps(self) -> int:
        """Optimizer steps so far; set it on restore."""
        return self._by_row.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._by_row.steps = steps

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Multiply each table's learning rate by ``multiplier`` from the next backward on."""
        for optimizer in self._fused:
            table = next(iter(optimizer.params)).removeprefix("embeddings.").removesuffix(".weight")
            for group in optimizer.param_groups:
                group["lr"] = self.training[table].learning_rate * multiplier
            optimizer.zero_grad()
        self._by_row.lr_multiplier = multiplier

    def zero_grad(self) -> None:
        """Prepare a training step. Call it before forward."""
        for kernel in self._fused_kernels:
            kernel.iter.fill_(self.steps)
            kernel.iter_cpu.fill_(self.steps)
        for weight in self._by_row.weights.values():
            weight.grad = None

    def step(self, found_inf: Tensor | None = None) -> None:
        """Finish a training step after backward, which has already updated the fused tables.

        If ``found_inf`` (scalar on the device) is not 0, other tables stay unchanged. ``steps`` increases all the same.
        """
        self._by_row.step(found_inf)

    def state_tensors(self) -> dict[str, ShardedTensor]:
        """Return the live states of tables with a shard on this rank: ``<table>.<state>`` → tensor."""
        tensors = {
            self._state_key(name): tensor
            for optimizer in self._fused
            for states in optimizer.state_dict()["state"].values()
            for name, tensor in states.items()
        }
        for kernel in self._sparse_kernels:
            names = [name for name, _ in kernel.named_parameters_by_table()]
            for state in self.training[names[0]].states:  # all tables of a kernel have the same optimizer
                moments = {name: self._by_row.states[name][state] for name in names}
                tensors.update(kernel.as_sharded_tensors(moments, state))
        return tensors

    def replicated_state_tensors(self) -> dict[str, Tensor]:
        """Return the live states of replicated tables: ``<table>.<state>`` → [rows, dim]."""
        return {
            f"{table}.{state}": tensor
            for table in self._replicated
            for state, tensor in self._by_row.states[table].items()
        }

    def _state_key(self, name: str) -> str:
        """Return ``<table>.<state>``. TorchRec names the first state of every optimizer momentum1."""
        table, _, state = name.rpartition(".")
        return f"{table}.{self.training[table].states[0]}" if state == "momentum1" else name


class RowOptimizer:
    """Applies :class:`hstu.ops.row_update.RowUpdate` to named tables [rows, D]."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        training: Mapping[str, TableTraining],
        args: OptimizerArgs,
        update_rows: UpdateRows = REFERENCE_KERNELS.update_rows,
    ) -> None:
        self.weights = dict(weights)
        self.states = {
            name: {state: torch.zeros_like(weight) for state in training[name].states}
            for name, weight in weights.items()
        }
        """Table → state name → live tensor."""
        self.steps = 0
        self.lr_multiplier = 1.0
        self._training, self._args, self._update_rows = training, args, update_rows

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        """Update rows that have a gradient. ``found_inf``: see :class:`hstu.ops.row_update.UpdateRows`."""
        self.steps += 1
        for name, weight in self.weights.items():
            if weight.grad is not None:
                own = self._training[name]
                update = RowUpdate(
                    optimizer=own.optimizer.removesuffix("w"),  # type: ignore[arg-type]  # adamw equals adam here
                    learning_rate=own.learning_rate * self.lr_multiplier,
                    eps=self._args.adam_eps,
                    betas=(self._args.adam_beta1, self._args.adam_beta2),
                    step=self.steps,
                    max_gradient=own.max_gradient,
                )
                self._update_rows(weight.grad, weight, tuple(self.states[name].values()), update, found_inf)
