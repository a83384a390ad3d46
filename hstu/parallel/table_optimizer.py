"""Optimizer and learning rate of each table, behind one optimizer for all tables.

TorchRec's fused optimizers update rows inside backward. ``TableOptimizer.step`` updates the rows of replicated tables,
and of sharded tables with an optimizer that FBGEMM lacks on the CPU.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from hstu.config.args import OptimizerArgs
from hstu.config.args.optimizer import OF_MATRICES
from hstu.model.embedding import TableSpec
from hstu.ops.costs import FLOAT32
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import RowUpdate, UpdateRows, sum_by_row
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import gradient_norm
from hstu.parallel.table_kernels import FusedEmbedding, Piece, RowSparseEmbedding, pieces_of

OPTIMIZERS: dict[str, tuple[EmbOptimType, tuple[str, ...]]] = {
    "sgd": (EmbOptimType.EXACT_SGD, ()),
    "adagrad": (EmbOptimType.EXACT_ADAGRAD, ("sum",)),
    "rowwise_adagrad": (EmbOptimType.EXACT_ROWWISE_ADAGRAD, ("rowwise_sum",)),
    "adam": (EmbOptimType.ADAM, ("exp_avg", "exp_avg_sq")),
    "adamw": (EmbOptimType.ADAM, ("exp_avg", "exp_avg_sq")),  # equals adam, as tables have no decay
    "partial_rowwise_adam": (EmbOptimType.PARTIAL_ROWWISE_ADAM, ("exp_avg", "rowwise_exp_avg_sq")),
}
"""Optimizer → FBGEMM's; names of its states in torch.optim, float32 [rows, columns], or [rows] for ``rowwise_…``."""


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
    """A key of OPTIMIZERS."""
    learning_rate: float
    max_gradient: float | None = None
    """Row gradients are clamped to ± this value."""

    @classmethod
    def of(cls, spec: TableSpec, args: OptimizerArgs) -> Self:
        """Read the table's own options; else OptimizerArgs.sparse_* if sharded; else the options of the dense model."""
        optimizer, rate = args.sparse_optimizer_str, args.sparse_learning_rate
        if spec.replicated:
            optimizer = rate = None
        optimizer = spec.optimizer or optimizer or OF_MATRICES.get(args.optimizer_str, args.optimizer_str)
        if spec.replicated and optimizer == "rowwise_adagrad":
            optimizer = "adagrad"
        rate = spec.learning_rate or rate or args.learning_rate
        return cls(optimizer, rate, args.sparse_max_gradient)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the optimizer states."""
        return OPTIMIZERS[self.optimizer][1]

    def bytes_per_row(self, columns: int) -> int:
        """Return the bytes of a row with its optimizer states."""
        numbers = [1 if is_rowwise(state) else columns for state in self.states]
        return (columns + sum(numbers)) * FLOAT32

    def is_row_sparse(self, device_type: str) -> bool:
        """Return whether ``TableOptimizer.step`` updates the sharded table, from sparse gradients."""
        return device_type == "cpu" and self.optimizer.endswith(("adam", "adamw"))

    def fused_params(self, args: OptimizerArgs) -> dict[str, Any]:
        """Return the training as keyword arguments of FBGEMM's tables."""
        params: dict[str, Any] = {"optimizer": OPTIMIZERS[self.optimizer][0], "learning_rate": self.learning_rate}
        if self.optimizer != "sgd":
            params["eps"] = args.adam_eps
        if self.optimizer.endswith(("adam", "adamw")):
            params |= {"beta1": args.adam_beta1, "beta2": args.adam_beta2}
        if self.max_gradient is not None:
            params["max_gradient"] = self.max_gradient  # for FusedEmbedding
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
        unmeasured: Collection[str] = (),
    ) -> None:
        """``training`` by table name, including tables without a shard here; ``replicated``: table name → weight.

        ``unmeasured``: tables whose last row has no gradient of its own, and is left out of ``gradient_norm``.
        """
        self.training = training
        self.steps = 0
        """Optimizer steps so far; set it on restore."""
        self._args, self._update_rows, self._lr_multiplier = args, update_rows, 1.0
        self._fused = [opt for collection in collections for _, opt in collection.fused_optimizer.optimizers]
        lookups = [lookup for collection in collections for lookup in collection._lookups]
        modules = [module for lookup in lookups for module in lookup.modules()]
        self._fused_kernels = [m for m in modules if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
        self._sparse_kernels = [m for m in modules if isinstance(m, RowSparseEmbedding)]
        self._measured = [m for m in modules if isinstance(m, FusedEmbedding)]
        self._unmeasured = unmeasured
        for kernel in self._measured:
            kernel.unmeasured = unmeasured
        self._replicated = list(replicated)
        own = [pair for kernel in self._sparse_kernels for pair in kernel.named_parameters_by_table()]
        self._weights = dict([*own, *replicated.items()])
        self.states = {
            name: {
                state: torch.zeros(weight.shape[: 2 - is_rowwise(state)], device=weight.device)
                for state in training[name].states
            }
            for name, weight in self._weights.items()
        }
        """Table that ``step`` updates → state name → live tensor."""

    @property
    def learning_rate(self) -> float:
        """The current learning rate of sharded tables that have none of their own."""
        return (self._args.sparse_learning_rate or self._args.learning_rate) * self._lr_multiplier

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Multiply each table's learning rate by ``multiplier`` from the next backward on."""
        for optimizer in self._fused:
            table = next(iter(optimizer.params)).removeprefix("embeddings.").removesuffix(".weight")
            for group in optimizer.param_groups:
                group["lr"] = self.training[table].learning_rate * multiplier
            optimizer.zero_grad()
        self._lr_multiplier = multiplier

    def zero_grad(self) -> None:
        """Prepare a training step. Call it before forward."""
        for kernel in self._fused_kernels:
            kernel.iter.fill_(self.steps)
            kernel.iter_cpu.fill_(self.steps)
        for weight in self._weights.values():
            weight.grad = None

    def measure_gradients(self, measures: bool) -> None:
        """Set whether the next lookup and its backward measure the gradients of fused tables."""
        for kernel in self._measured:
            kernel.measures, kernel.square = measures, 0.0

    def gradient_norm(self, mesh: Mesh) -> Tensor:
        """L2 norm of the gradients of the rows of all tables, as a scalar on the device. Collective.

        The gradient of a row is summed over all look-ups of the global batch, and not clamped yet. Call it between
        backward and ``step``, and ``measure_gradients`` before the look-up.
        """
        total = torch.zeros((), device=mesh.device) + sum(kernel.square for kernel in self._measured)
        weights = {name: weight for name, weight in self._weights.items() if weight.grad is not None}
        replicated = [weights.pop(name) for name in self._replicated if name in weights]
        for name, weight in weights.items():
            rows, sums = sum_by_row(cast(Tensor, weight.grad))
            total += sums[rows != (len(weight) - 1 if name in self._unmeasured else -1)].square().sum()
        if mesh.world_size > 1:
            dist.all_reduce(total, group=mesh.world_group)
        return (total + gradient_norm(replicated, None).square()).sqrt() if replicated else total.sqrt()

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        """Finish a training step after backward, which has already updated the fused tables.

        Updates the rows of other tables that have a gradient; if ``found_inf`` (scalar on the device) is not 0, they
        stay unchanged. ``steps`` increases all the same.
        """
        self.steps += 1
        for name, weight in self._weights.items():
            if weight.grad is not None:
                own = self.training[name]
                update = RowUpdate(
                    optimizer=own.optimizer.removesuffix("w"),  # type: ignore[arg-type]  # adamw equals adam here
                    learning_rate=own.learning_rate * self._lr_multiplier,
                    eps=self._args.adam_eps,
                    betas=(self._args.adam_beta1, self._args.adam_beta2),
                    step=self.steps,
                    max_gradient=own.max_gradient,
                )
                self._update_rows(weight.grad, weight, tuple(self.states[name].values()), update, found_inf)

    def state_tensors(self) -> dict[str, list[Piece]]:
        """Return the live states of tables with a shard on this rank: ``<table>.<state>`` → shards."""
        held = {
            self._state_key(name): pieces_of(tensor)
            for optimizer in self._fused
            for states in optimizer.state_dict()["state"].values()
            for name, tensor in states.items()
        }
        for kernel in self._sparse_kernels:
            names = [name for name, _ in kernel.named_parameters_by_table()]
            for state in self.training[names[0]].states:  # all tables of a kernel have the same optimizer
                for name, piece in kernel.pieces({name: self.states[name][state] for name in names}):
                    held.setdefault(f"{name}.{state}", []).append(piece)
        return held

    def replicated_state_tensors(self) -> dict[str, Tensor]:
        """Return the live states of replicated tables: ``<table>.<state>`` → [rows, dim]."""
        return {
            f"{table}.{state}": tensor for table in self._replicated for state, tensor in self.states[table].items()
        }

    def _state_key(self, name: str) -> str:
        """Return ``<table>.<state>``. TorchRec names the first state of every optimizer momentum1."""
        table, _, state = name.rpartition(".")
        return f"{table}.{self.training[table].states[0 if state == 'momentum1' else 1]}"
