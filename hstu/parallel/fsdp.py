"""Dense weights sharded over the ranks with equal dense weights, by torch's FSDP2 (ZeRO stage 3).

FSDP gathers a layer's weights for its forward, frees them, gathers them again for its backward, and reduce-scatters
their gradients. All other dense weights form one unit, which stays gathered from forward to backward. Each weight is
split by rows into equal parts, one per rank. Weights that a layer only uses in a 16-bit compute type travel in it:
:class:`LayerGather`. HSTULayerFunction saves gathered weights for backward; they take no memory in between, because
FSDP frees and refills their storage.

Source: Zhao et al., PyTorch FSDP, VLDB 2023.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin
from torch.distributed.tensor import DTensor

from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.stack import ROUNDED_WEIGHTS, FusedHSTULayer
from hstu.parallel.collectives import gather_copies
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView, all_finite, local_part, view_of


class LayerGather(DefaultAllocMixin, AllGather):
    """FSDP's all-gather of a layer whose matrix products have a 16-bit dtype.

    The layer rounds ROUNDED_WEIGHTS to it before use, so rounding them before they are sent changes no bit and halves
    their bytes. A MixedPrecisionPolicy would also round the norms and the relative bias, which are used in float32.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, ranks: int) -> None:
        shares = [
            (name, weight.numel() // len(weight) * -(-len(weight) // ranks))
            for name, weight in layer.named_parameters()
        ]
        self.dtypes = [dtype if name in ROUNDED_WEIGHTS else torch.float32 for name, _ in shares]
        self.counts = [count for _, count in shares]
        """Numbers of each weight on a rank, padding included, in the order in which FSDP sends them."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather the ranks' shares, float32, in one exchange."""
        parts = [
            part.to(dtype).view(torch.uint8)
            for part, dtype in zip(input_tensor.split(self.counts), self.dtypes, strict=True)
        ]
        gathered = gather_copies(torch.cat(parts), group).split([len(part) for part in parts], 1)
        targets = output_tensor.view(dist.get_world_size(group), -1).split(self.counts, 1)
        for target, received, dtype in zip(targets, gathered, self.dtypes, strict=True):
            target.copy_(received.contiguous().view(dtype))


class FullySharded(DefaultAllocMixin, ReduceScatter):
    """The FSDP units of a dense part, and a check of gradients before they are averaged."""

    def __init__(self, dense: DenseModel, mesh: Mesh, sent_as: torch.dtype, computed_as: torch.dtype) -> None:
        """Shard the weights of ``dense`` in place, except for replicated tables."""
        self.group = mesh.dp_cp_group
        self.sent_as = sent_as
        """Dtype for exchanging gradients, which are float32 before and after."""
        self.own_units_finite: list[Tensor] = []
        """One bool scalar on the device per unit averaged in this step."""
        self.tables = list(dense.replicated.parameters())
        attributes = {name: vars(weight) for name, weight in dense.named_parameters()}
        ranks = DeviceMesh.from_group(self.group, mesh.device.type)
        layers = [module for module in dense.modules() if isinstance(module, FusedHSTULayer)]
        of_layers = {weight for layer in layers for weight in layer.parameters()}  # freed after their forward
        dense.filled = [name for name, weight in dense.task.named_parameters() if weight not in of_layers]
        self.units: list[FSDPModule] = [fully_shard(layer, mesh=ranks) for layer in layers]
        self.root: FSDPModule = fully_shard(dense, mesh=ranks, ignored_params=set(self.tables))
        self.units.append(self.root)
        for name, weight in dense.named_parameters():
            vars(weight).update(attributes[name])  # restore the marks of tensor-parallel weights
        for unit in self.units:
            unit.set_custom_reduce_scatter(self)
        if computed_as.itemsize < torch.float32.itemsize:
            for unit, layer in zip(self.units, layers, strict=False):
                unit.set_custom_all_gather(LayerGather(layer, computed_as, mesh.dp_cp_size))

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """FSDP's reduce-scatter: check this rank's gradients, then average as ReplicatedDense does, also on gloo."""
        sent = input_tensor.to(self.sent_as)
        self.own_units_finite.append(all_finite([sent]))
        sent.mul_(1.0 / dist.get_world_size(group))
        received = output_tensor.to(self.sent_as)
        dist.reduce_scatter_tensor(received, sent, group=group)
        output_tensor.copy_(received)

    def average_table_gradients(self) -> None:
        """Average the dense gradients of replicated tables after backward. Skips sparse gradients (CPU)."""
        for weight in self.tables:
            if weight.device.type != "cpu":
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad.mul_(1.0 / dist.get_world_size(self.group)), group=self.group)


def shard_dense(
    model: GRModel, mesh: Mesh, sent_as: torch.dtype = torch.float32, computed_as: torch.dtype = torch.float32
) -> GRModel:
    """Shard the weights of ``model.dense`` if several ranks have equal ones.

    sent_as: see FullySharded. computed_as: dtype of the matrix products of the layers.
    """
    if mesh.dp_cp_size > 1:
        dense = model.dense
        assert isinstance(dense, DenseModel)
        sharded = FullySharded(dense, mesh, sent_as, computed_as)
        dense.fully_sharded = sharded  # type: ignore[assignment]  # nn.Module declares only tensors and modules
    return model


def fully_sharded(dense: nn.Module) -> FullySharded | None:
    """Return the FullySharded that ``shard_dense`` has attached to ``dense``, or None."""
    found: FullySharded | None = getattr(dense, "fully_sharded", None)
    return found


class FsdpWeights:
    """Weights of which each rank updates its own rows. Per step: backward, ``take_gradients``, update of ``own``."""

    def __init__(self, weights: Mapping[str, nn.Parameter], sharded: FullySharded) -> None:
        self._weights, self._sharded = dict(weights), sharded
        self.own = {name: nn.Parameter(local_part(weight.detach())) for name, weight in weights.items()}
        """Weight → the rows that this rank updates, possibly none, in its memory and with a gradient of their own."""

    def take_gradients(self) -> None:
        """After backward, set the gradient of each tensor in ``own``, sharing memory with the weight's gradient."""
        for name, own in self.own.items():
            gradient = self._weights[name].grad
            own.grad = None if gradient is None else local_part(gradient)

    def zero_grad(self) -> None:
        """Drop the gradients of the weights and of ``own``."""
        for weight in (*self._weights.values(), *self.own.values()):
            weight.grad = None

    @contextmanager
    def lend(self, owned: Mapping[str, Tensor]) -> Iterator[None]:
        """Swap in the weights in ``owned`` (tensors shaped like ``own``), and let parts of the model be called.

        Units gather their weights in forward; the root's weights stay gathered. Entering is collective. Leaving is not,
        so that a failed rank need not wait for others.
        """
        self._swap(owned)
        self._sharded.root.unshard()  # evaluations call submodules of the root, such as the item tower, directly
        try:
            yield
        finally:
            self._swap(owned)

    def view(self, name: str, owned: Tensor) -> ShardedView:
        """Return a view of a weight-sized tensor, of which ``owned`` holds this rank's rows."""
        weight = self._weights[name].detach()
        assert isinstance(weight, DTensor)
        return view_of(weight, owned)

    def _swap(self, owned: Mapping[str, Tensor]) -> None:
        for unit in self._sharded.units:
            unit.reshard()  # free the gathered weights; the next forward gathers them again
        with torch.no_grad():
            for name, other in owned.items():
                own, copy = self.own[name], other.clone()
                other.copy_(own)
                own.copy_(copy)
