"""One interface over the two ways in which sharded tables are trained.

FusedTables: TorchRec's fused optimizers, which update rows inside backward.
SteppedTables: RowLazyAdam, which updates them at ``step``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from hstu.parallel.row_lazy_adam import RowLazyAdam

STATES = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("rowwise_sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
"""Optimizer → what it keeps of a table, in the names of torch.optim: [rows, columns] numbers; rowwise_…: one a row."""


class TableOptimizer(ABC):
    """Optimizer of all sharded tables of a model."""

    def __init__(self, name: str, learning_rate: float) -> None:
        self.states = STATES[name]
        """The states of every table."""
        self.learning_rate = learning_rate
        """Peak learning rate."""
        self.steps = 0
        """Optimizer steps taken: with ``state_tensors`` the whole state, to be set on restore."""

    def set_lr_multiplier(self, multiplier: float) -> None:
        """From the next backward on, use ``learning_rate × multiplier``."""
        self._set_learning_rate(self.learning_rate * multiplier)

    @abstractmethod
    def _set_learning_rate(self, learning_rate: float) -> None: ...

    @abstractmethod
    def zero_grad(self) -> None:
        """Before the forward of a training step."""

    @abstractmethod
    def step(self) -> None:
        """After its backward."""

    @abstractmethod
    def state_tensors(self) -> dict[str, ShardedTensor]:
        """The live state, ``<table>.<state>`` → ShardedTensor; only tables with a shard on this rank."""


class FusedTables(TableOptimizer):
    """The optimizers that are fused into TorchRec's kernels.

    They read the learning rate from their param_groups in zero_grad and step only, and their Adam (CUDA) takes its
    step count from the number of *forward calls*, evaluation included: both are set before each training step.
    """

    def __init__(self, name: str, collections: Sequence[ShardedEmbeddingCollection], learning_rate: float) -> None:
        super().__init__(name, learning_rate)
        self._optimizers = [collection.fused_optimizer for collection in collections]
        self._kernels = list(_fused_kernels(collections))

    def _set_learning_rate(self, learning_rate: float) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad()

    def zero_grad(self) -> None:
        """See TableOptimizer."""
        for kernel in self._kernels:
            kernel.iter.fill_(self.steps)
            kernel.iter_cpu.fill_(self.steps)

    def step(self) -> None:
        """See TableOptimizer. The rows have been updated by backward."""
        self.steps += 1

    def state_tensors(self) -> dict[str, ShardedTensor]:
        """See TableOptimizer."""
        tensors: dict[str, ShardedTensor] = {}
        for optimizer in self._optimizers:
            for states in optimizer.state_dict()["state"].values():
                tensors |= {self._named(name): tensor for name, tensor in states.items()}
        return tensors

    def _named(self, name: str) -> str:
        """TorchRec calls the first state momentum1, whatever it is."""
        table, _, state = name.rpartition(".")
        return f"{table}.{self.states[0]}" if state == "momentum1" else name


def _fused_kernels(
    collections: Sequence[ShardedEmbeddingCollection],
) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    for collection in collections:
        for lookup in collection._lookups:
            for module in lookup.modules():
                if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                    yield module


class SteppedTables(TableOptimizer):
    """RowLazyAdam over the sparse gradients of RowSparseEmbeddingCollections."""

    def __init__(
        self,
        collections: Sequence[ShardedEmbeddingCollection],
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__("adam", learning_rate)
        self._kernels = [
            kernel for collection in collections for lookup in collection._lookups for kernel in lookup._emb_modules
        ]
        parameters = [weight for kernel in self._kernels for _, weight in kernel.named_parameters_by_table()]
        # torch refuses an optimizer without parameters, but a rank may hold no shard of any table
        self._adam = RowLazyAdam(parameters or [torch.nn.Parameter(torch.empty(0))], learning_rate, betas, eps)

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    def zero_grad(self) -> None:
        """See TableOptimizer."""
        self._adam.zero_grad(set_to_none=True)

    def step(self) -> None:
        """See TableOptimizer."""
        self._adam.steps = self.steps
        self._adam.step()
        self.steps = self._adam.steps

    def state_tensors(self) -> dict[str, ShardedTensor]:
        """See TableOptimizer."""
        tensors: dict[str, ShardedTensor] = {}
        for kernel in self._kernels:
            for state in self.states:
                moments = {name: self._adam.state[weight][state] for name, weight in kernel.named_parameters_by_table()}
                tensors.update(kernel.as_sharded_tensors(moments, state))
        return tensors
