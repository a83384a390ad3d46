"""One interface over the two ways in which sharded tables are trained.

_FusedTables: TorchRec's fused optimizers, which update rows inside backward.
_SteppedTables: RowLazyAdam, which updates them at ``step``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from hstu.config.args import OptimizerArgs
from hstu.parallel.row_lazy_adam import RowLazyAdam
from hstu.parallel.row_sparse import RowSparseEmbedding
from hstu.parallel.table_training import STATES, TableTraining


class TableOptimizer:
    """Optimizer of all sharded tables of a model, each with its own training.

    ``training``: of each table by name, of those without a shard on this rank, too.
    """

    def __init__(
        self,
        collections: Sequence[ShardedEmbeddingCollection],
        training: Mapping[str, TableTraining],
        args: OptimizerArgs,
    ) -> None:
        self.training = training
        self.steps = 0
        """Optimizer steps taken: with ``state_tensors`` the whole state, to be set on restore."""
        self._fused = _FusedTables(collections, training)
        self._stepped = _SteppedTables(collections, training, args)

    def set_lr_multiplier(self, multiplier: float) -> None:
        """From the next backward on, use each table's learning rate × multiplier."""
        self._fused.set_lr_multiplier(multiplier)
        self._stepped.set_lr_multiplier(multiplier)

    def zero_grad(self) -> None:
        """Before the forward of a training step."""
        self._fused.begin(self.steps)
        self._stepped.zero_grad()

    def step(self) -> None:
        """After its backward, which has updated the rows of the fused ones."""
        self._stepped.step(self.steps)
        self.steps += 1

    def state_tensors(self) -> dict[str, ShardedTensor]:
        """The live state, ``<table>.<state>`` → ShardedTensor; only tables with a shard on this rank."""
        return self._fused.state_tensors() | self._stepped.state_tensors()


class _FusedTables:
    """The optimizers that are fused into TorchRec's kernels, one for each group of tables that are trained alike.

    They read the learning rate from their param_groups in zero_grad and step only, and their Adam (CUDA) takes its
    step count from the number of *forward calls*, evaluation included: both are set before each training step.
    """

    def __init__(
        self, collections: Sequence[ShardedEmbeddingCollection], training: Mapping[str, TableTraining]
    ) -> None:
        self._training = training
        self._optimizers = [opt for collection in collections for _, opt in collection.fused_optimizer.optimizers]
        self._kernels = list(_fused_kernels(collections))

    def set_lr_multiplier(self, multiplier: float) -> None:
        for optimizer in self._optimizers:
            table = next(iter(optimizer.params)).removeprefix("embeddings.").removesuffix(".weight")
            for group in optimizer.param_groups:
                group["lr"] = self._training[table].learning_rate * multiplier
            optimizer.zero_grad()

    def begin(self, steps: int) -> None:
        for kernel in self._kernels:
            kernel.iter.fill_(steps)
            kernel.iter_cpu.fill_(steps)

    def state_tensors(self) -> dict[str, ShardedTensor]:
        tensors: dict[str, ShardedTensor] = {}
        for optimizer in self._optimizers:
            for states in optimizer.state_dict()["state"].values():
                tensors |= {self._named(name): tensor for name, tensor in states.items()}
        return tensors

    def _named(self, name: str) -> str:
        """TorchRec calls the first state momentum1, whatever it is."""
        table, _, state = name.rpartition(".")
        return f"{table}.{self._training[table].states[0]}" if state == "momentum1" else name


def _fused_kernels(
    collections: Sequence[ShardedEmbeddingCollection],
) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    for collection in collections:
        for lookup in collection._lookups:
            for module in lookup.modules():
                if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                    yield module


class _SteppedTables:
    """RowLazyAdam over the sparse gradients of RowSparseEmbeddings."""

    def __init__(
        self,
        collections: Sequence[ShardedEmbeddingCollection],
        training: Mapping[str, TableTraining],
        args: OptimizerArgs,
    ) -> None:
        lookups = [lookup for collection in collections for lookup in collection._lookups]
        self._kernels = [
            kernel for lookup in lookups for kernel in lookup._emb_modules if isinstance(kernel, RowSparseEmbedding)
        ]
        self._training = training
        groups: list[dict[str, Any]] = [
            {
                "params": [weight],
                "lr": training[table].learning_rate,
                "max_gradient": training[table].max_gradient,
                "table": table,
            }
            for kernel in self._kernels
            for table, weight in kernel.named_parameters_by_table()
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        # torch refuses an optimizer without parameters, but a rank may hold no shard of any table
        self._adam = RowLazyAdam(groups, args.learning_rate, betas, args.adam_eps) if groups else None

    def set_lr_multiplier(self, multiplier: float) -> None:
        for group in self._adam.param_groups if self._adam else ():
            group["lr"] = self._training[group["table"]].learning_rate * multiplier

    def zero_grad(self) -> None:
        if self._adam is not None:
            self._adam.zero_grad(set_to_none=True)

    def step(self, steps: int) -> None:
        """``steps``: taken before."""
        if self._adam is not None:
            self._adam.steps = steps
            self._adam.step()

    def state_tensors(self) -> dict[str, ShardedTensor]:
        if self._adam is None:
            return {}
        tensors: dict[str, ShardedTensor] = {}
        for kernel in self._kernels:
            weights = dict(kernel.named_parameters_by_table())
            for state in STATES["adam"]:
                moments = {name: self._adam.state[weight][state] for name, weight in weights.items()}
                tensors.update(kernel.as_sharded_tensors(moments, state))
        return tensors
