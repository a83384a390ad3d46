"""All optimizers of a run behind one face."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from hstu.config.args import OptimizerArgs
from hstu.model.embedding import ReplicatedTables
from hstu.model.gr_model import GRModel
from hstu.optim.dense import DenseOptimizer, decayed_parameters
from hstu.optim.parts import Cite, replicated_settings, settings_of_weights
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import clip_grad_norm
from hstu.parallel.table_optimizer import TableOptimizer


class Optimizers:
    """The dense optimizer and that of the sharded tables, moved by one learning-rate multiplier.

    A step: zero_grad, forward, backward (fused tables update here), clip_grad_norm, step. A checkpoint
    restores the parts' ``state_tensors`` in place; state_dict and load_state_dict are for copies on the same ranks.
    """

    def __init__(
        self, dense: DenseOptimizer, tables: TableOptimizer, tp_group: dist.ProcessGroup | None = None
    ) -> None:
        self.dense = dense
        self.tables = tables
        self.tp_group = tp_group
        """Over which dense parameters are cut; None where they are not."""
        self.lr_multiplier = 1.0

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Scale every learning rate, from the next backward on."""
        self.lr_multiplier = multiplier
        self.dense.set_lr_multiplier(multiplier)
        self.tables.set_lr_multiplier(multiplier)

    @property
    def learning_rate(self) -> float:
        """The dense learning rate in force."""
        return self.dense.learning_rate * self.lr_multiplier

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the dense part has the average of its weights (OptimizerArgs.ema_decay), where one is kept."""
        return self.dense.averaged_weights()

    def zero_grad(self) -> None:
        """Before the forward of a training step."""
        self.dense.zero_grad()
        self.tables.zero_grad()

    def scale_gradients(self, factor: float) -> None:
        """Multiply the dense gradients, float32, by ``factor``. Sharded tables' have gone where they belong."""
        gradients = [weight.grad for weight in self.dense.parameters.values() if weight.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the dense gradients so that their global L2 norm is at most ``max_norm``.

        Returns the norm before clipping as a scalar on the device; nothing waits for it. DDP has made the gradients
        equal on all ranks, so the norm is, too. Gradients of sharded tables are not part of it.
        """
        return clip_grad_norm(self.dense.parameters.values(), max_norm, self.tp_group)

    def step(self) -> None:
        """Update what backward has not updated already."""
        self.dense.step()
        self.tables.step()

    def state_tensors(self) -> dict[str, Tensor | ShardedTensor]:
        """All live state tensors: ``dense.<parameter>.<state>`` and ``tables.<table>.<state>``."""
        dense = {f"dense.{name}": tensor for name, tensor in self.dense.state_tensors().items()}
        return dense | {f"tables.{name}": tensor for name, tensor in self.tables.state_tensors().items()}

    def counters(self) -> dict[str, Any]:
        """The state that is no tensor."""
        return {"table_steps": self.tables.steps, "lr_multiplier": self.lr_multiplier}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore ``counters``."""
        self.tables.steps = counters["table_steps"]
        self.set_lr_multiplier(counters["lr_multiplier"])

    def state_dict(self) -> dict[str, Any]:
        """The whole state; its tensors are live."""
        return {"tensors": self.state_tensors(), "counters": self.counters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy ``state`` (of the same ranks and sharding) into this one. Raises KeyError naming what is missing."""
        for name, target in self.state_tensors().items():
            source = state["tensors"][name]
            if isinstance(target, ShardedTensor):
                for mine, theirs in zip(target.local_shards(), source.local_shards(), strict=True):
                    mine.tensor.copy_(theirs.tensor)
            else:
                target.copy_(source)
        self.load_counters(state["counters"])


def build_optimizers(
    model: GRModel, args: OptimizerArgs, tables: TableOptimizer, mesh: Mesh, cite: Cite | None = None
) -> Optimizers:
    """The optimizers of a model whose tables are sharded (and whose dense part may be cut, and wrapped by DDP).

    Raises ConfigError where OptimizerArgs.part_optimizers do not fit its weights; ``cite`` words what is wrong.
    """
    dense = unwrap_dense(model)
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    replicated = {
        names[id(part.weight(spec.name))]: replicated_settings(spec, args)
        for part in dense.modules()
        if isinstance(part, ReplicatedTables)
        for spec in part.specs.values()
    }
    decaying = {id(parameter) for parameter in decayed_parameters(dense)}
    weights = {name: key in decaying for key, name in names.items() if name not in replicated}
    optimizer = DenseOptimizer(dense, args, settings_of_weights(weights, args, cite) | replicated)
    return Optimizers(optimizer, tables, mesh.tp_group if mesh.tp_size > 1 else None)
