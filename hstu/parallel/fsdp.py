"""Dense weights of which each rank with equal ones holds a part: torch's FSDP2 (ZeRO stage 3).

A layer's weights are gathered for its forward and freed, gathered again for its backward, and their gradients are
reduce-scattered. All other dense weights are one more unit, which stays gathered from forward to backward. The rows of
a weight are cut into as many equal parts as there are ranks with equal dense weights. HSTULayerFunction saves the
gathered weights for backward; FSDP frees their memory and fills it again, so they take none in between.

Source: Zhao et al., PyTorch FSDP, VLDB 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.stack import FusedHSTULayer
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView, WeightShares, all_finite, local_part, view_of


class FullySharded:
    """How a dense part is sharded: its units, and what it learns about gradients before they are averaged."""

    def __init__(self, dense: DenseModel, mesh: Mesh, sent_as: torch.dtype) -> None:
        """Shard the weights of ``dense`` in place; those of its replicated tables stay whole."""
        self.group = mesh.dp_cp_group
        """All ranks with equal dense weights."""
        self.sent_as = sent_as
        """Dtype in which gradients are exchanged. They are float32 before and after."""
        self.own_units_finite: list[Tensor] = []
        """One bool scalar on the device per unit whose gradients were averaged in this step."""
        self.tables = list(dense.replicated.parameters())
        attributes = {name: vars(weight) for name, weight in dense.named_parameters()}
        ranks = DeviceMesh.from_group(self.group, mesh.device.type)
        layers = [module for module in dense.modules() if isinstance(module, FusedHSTULayer)]
        of_layers = {weight for layer in layers for weight in layer.parameters()}  # gone after its forward
        dense.filled = [name for name, weight in dense.task.named_parameters() if weight not in of_layers]
        self.units: list[FSDPModule] = [fully_shard(layer, mesh=ranks) for layer in layers]
        self.root: FSDPModule = fully_shard(dense, mesh=ranks, ignored_params=set(self.tables))
        self.units.append(self.root)
        for name, weight in dense.named_parameters():
            vars(weight).update(attributes[name])  # those that mark tensor-parallel weights
        for unit in self.units:
            unit.set_custom_reduce_scatter(self)  # type: ignore[arg-type]

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP's reduce-scatter."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """FSDP's reduce-scatter: check this rank's gradients, then average as ReplicatedDense does, also over gloo."""
        sent = input_tensor.to(self.sent_as)
        self.own_units_finite.append(all_finite([sent]))
        sent.mul_(1.0 / dist.get_world_size(group))
        received = output_tensor.to(self.sent_as)
        dist.reduce_scatter_tensor(received, sent, group=group)
        output_tensor.copy_(received)

    def average_table_gradients(self) -> None:
        """After backward: average the dense gradients of replicated tables. On a CPU theirs are sparse."""
        for weight in self.tables:
            if weight.device.type != "cpu":
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad.mul_(1.0 / dist.get_world_size(self.group)), group=self.group)

    def reshard(self) -> None:
        """Free the gathered weights, so that the next forward gathers them again."""
        for unit in self.units:
            unit.reshard()


def shard_dense(model: GRModel, mesh: Mesh, sent_as: torch.dtype = torch.float32) -> GRModel:
    """Shard the weights of ``model.dense``, if several ranks have equal ones. ``sent_as``: see FullySharded."""
    if mesh.dp_cp_size > 1:
        dense = model.dense
        assert isinstance(dense, DenseModel)
        sharded = FullySharded(dense, mesh, sent_as)
        dense.fully_sharded = sharded  # type: ignore[assignment]  # nn.Module declares only tensors and modules
    return model


def fully_sharded(dense: nn.Module) -> FullySharded | None:
    """How ``shard_dense`` has sharded ``dense``; None if it has not."""
    found: FullySharded | None = getattr(dense, "fully_sharded", None)
    return found


class FsdpWeights(WeightShares):
    """Fully sharded weights: each rank updates the rows that it has."""

    def __init__(self, weights: Mapping[str, nn.Parameter], sharded: FullySharded) -> None:
        """``weights``: those of ``sharded``, all DTensors."""
        super().__init__(weights, {name: local_part(weight.detach()) for name, weight in weights.items()})
        self._sharded = sharded

    def gather(self) -> None:
        """Do nothing: the next forward gathers the weights."""

    @contextmanager
    def lend(self, owned: Mapping[str, Tensor]) -> Iterator[None]:
        """See WeightShares. Units gather their weights in forward; the root's stay gathered."""
        self._swap(owned)
        self._sharded.root.unshard()  # evaluations call parts of it, such as the item tower, by themselves
        try:
            yield
        finally:
            self._swap(owned)

    def view(self, name: str, owned: Tensor) -> ShardedView:
        """See WeightShares."""
        weight = self.weights[name].detach()
        assert isinstance(weight, DTensor)
        return view_of(weight, owned)

    def _own_part(self, name: str, gradient: Tensor) -> Tensor:
        return gradient

    def _swap(self, owned: Mapping[str, Tensor]) -> None:
        self._sharded.reshard()
        with torch.no_grad():
            for name, other in owned.items():
                own, copy = self.own[name], other.clone()
                other.copy_(own)
                own.copy_(copy)
