"""Data parallelism of the dense part: weights replicated by DDP, or sharded by torch's FSDP2 (ZeRO stage 3).

A rank's loss is ``local sum / global number of labels × data-parallel size``. Both average its gradient over ranks, and
TorchRec does so for the tables, so updates use the gradient of the mean over the global batch.

FSDP gathers a layer's weights for its forward, frees them, gathers them again for its backward, and reduce-scatters
their gradients. All other dense weights form one unit, which stays gathered from forward to backward. Each weight is
split by rows into equal parts, one per rank. Weights that a layer only uses in a 16-bit compute type travel in it:
:class:`LayerGather`. HSTULayerFunction saves gathered weights for backward; they take no memory in between, because
FSDP frees and refills their storage. Source: Zhao et al., PyTorch FSDP, VLDB 2023.
"""

# No `from __future__ import annotations`: DDP inspects the annotations of the communication hook.

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import compress
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hstu.model.embedding import ReplicatedTables
from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.stack import ROUNDED_WEIGHTS, FusedHSTULayer
from hstu.ops.row_update import sum_by_row
from hstu.parallel.collectives import PADDING_ID, gather_copies, gather_rows
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView, all_finite, local_part, numbers_of, view_of


class ReplicatedDense(DistributedDataParallel):
    """DDP that checks this rank's gradients before averaging, when a nan still shows the rank it comes from."""

    def __init__(self, dense: nn.Module, group: dist.ProcessGroup, sent_as: torch.dtype = torch.float32) -> None:
        self._set_params_and_buffers_to_ignore_for_model(dense, sparse_tables(dense))
        super().__init__(dense, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.sent_as = sent_as
        """Dtype for exchanging gradients, which are float32 before and after."""
        self.own_finite: list[Tensor] = []
        """One bool scalar on the device per bucket averaged in this step."""
        self.register_comm_hook(self, ReplicatedDense.average_bucket)
        # By default DDP reorders its buckets after the first step, and the order of additions over three or more ranks
        # depends on the position in a bucket. A resumed run would differ in its last bits from an uninterrupted one.
        self.reducer._push_all_rebuilt_params()  # as if all gradients had arrived in the order of the reducer

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """Return the last parameters first, the order in which gradients arrive."""
        parameters, expect_sparse_gradient = super()._build_params_for_reducer()
        return parameters[::-1], expect_sparse_gradient[::-1]

    def average_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start averaging a bucket that DDP has filled; return a future of the averages."""
        gradients, group = bucket.buffer(), self.process_group
        sent = gradients.to(self.sent_as)  # no copy if the dtype is the same
        self.own_finite.append(all_finite([sent]))  # if finite in this dtype, the average is finite as well
        sent.mul_(1.0 / dist.get_world_size(group))  # the same bits as DDP's own averaging
        averaged = dist.all_reduce(sent, group=group, async_op=True).get_future()
        if sent is gradients:
            return averaged.then(lambda done: done.value()[0])
        return averaged.then(lambda done: gradients.copy_(done.value()[0]))


def replicate_dense(model: GRModel, mesh: Mesh, sent_as: torch.dtype = torch.float32) -> GRModel:
    """Wrap ``model.dense`` in DDP if several ranks have equal dense weights. ``sent_as``: see ReplicatedDense.

    Every parameter gets a gradient on every rank (see DenseModel), so DDP need not search for unused parameters.
    :func:`average_sparse_gradients` averages the sparse gradients of replicated tables.
    """
    if mesh.dp_cp_size > 1:
        model.dense = ReplicatedDense(model.dense, mesh.dp_cp_group, sent_as)
    return model


class LayerGather(DefaultAllocMixin, AllGather):
    """FSDP's all-gather of a layer whose matrix products have a 16-bit dtype.

    The layer rounds ROUNDED_WEIGHTS to it before use, so rounding them before they are sent changes no bit and halves
    their bytes. A MixedPrecisionPolicy would also round the norms and the relative bias, which are used in float32.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, ranks: int) -> None:
        weights = dict(layer.named_parameters())
        self.dtypes = [dtype if name in ROUNDED_WEIGHTS else torch.float32 for name in weights]
        self.counts = [weight.numel() // len(weight) * -(-len(weight) // ranks) for weight in weights.values()]
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
        self.sent_as, self.own_finite = sent_as, list[Tensor]()
        """See ReplicatedDense; ``own_finite`` has a scalar per unit."""
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
        self.own_finite.append(all_finite([sent]))
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
        dense = cast(DenseModel, model.dense)
        sharded = FullySharded(dense, mesh, sent_as, computed_as)
        dense.fully_sharded = sharded  # type: ignore[assignment]  # nn.Module declares only tensors and modules
    return model


def fully_sharded(dense: nn.Module) -> FullySharded | None:
    """Return the FullySharded that ``shard_dense`` has attached to ``dense``, or None."""
    return getattr(dense, "fully_sharded", None)


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
        return view_of(cast(DTensor, self._weights[name].detach()), owned)

    def _swap(self, owned: Mapping[str, Tensor]) -> None:
        for unit in self._sharded.units:
            unit.reshard()  # free the gathered weights; the next forward gathers them again
        with torch.no_grad():
            for name, other in owned.items():
                own, copy = self.own[name], other.clone()
                other.copy_(own)
                own.copy_(copy)


def unwrap_dense(model: GRModel) -> nn.Module:
    """Return the dense part without DDP wrapper: its parameter names are the same for any number of ranks."""
    dense = model.dense
    return dense.module if isinstance(dense, DistributedDataParallel) else dense


def own_gradients_finite(dense: nn.Module) -> Tensor:
    """Return whether this rank's dense gradients were finite before averaging: bool scalar. Call after backward."""
    gradients = [parameter.grad for parameter in dense.parameters() if parameter.grad is not None]
    averages = fully_sharded(dense) or (dense if isinstance(dense, ReplicatedDense) else None)
    if averages is None:
        return all_finite([numbers_of(gradient) for gradient in gradients])
    checked, averages.own_finite = averages.own_finite, []
    is_left_out = [grad.is_sparse or not (isinstance(grad, DTensor) or averages is dense) for grad in gradients]
    rest = [numbers_of(gradient) for gradient in compress(gradients, is_left_out)]
    return torch.stack([*checked, *([all_finite(rest)] if rest else [])]).all()


def sparse_tables(dense: nn.Module) -> list[str]:
    """Return the names of the weights with sparse gradients."""
    return [
        f"{name}.{weight_name}"
        for name, part in dense.named_modules()
        if isinstance(part, ReplicatedTables)
        for weight_name, weight in part.named_parameters()
        if weight.device.type == "cpu"
    ]


@contextmanager
def gradient_sync(dense: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Context of a micro-batch: average gradients once per step, after their sum over all micro-batches."""
    if isinstance(dense, FSDPModule):
        dense.set_requires_gradient_sync(is_last)
    with dense.no_sync() if isinstance(dense, ReplicatedDense) and not is_last else nullcontext():
        yield


def average_sparse_gradients(dense: nn.Module) -> None:
    """Average the gradients that DDP or FSDP leave out. Call after own_gradients_finite. Collective.

    Ranks exchange the rows of sparse gradients, where DDP would add up whole tables. All ranks add rows in rank order.
    """
    if isinstance(dense, ReplicatedDense):
        group, module = dense.process_group, dense.module
    elif sharded := fully_sharded(dense):
        sharded.average_table_gradients()
        group, module = sharded.group, dense
    else:
        return
    weights = [module.get_parameter(name) for name in sparse_tables(module)]
    for weight in weights:
        if weight.grad is None:  # no row was looked up
            weight.grad = torch.sparse_coo_tensor(
                torch.empty(1, 0, dtype=torch.int64), torch.empty(0, weight.shape[1]), weight.shape
            )
    found = [sum_by_row(cast(Tensor, weight.grad)) for weight in weights]
    largest = torch.tensor([len(rows) for rows, _ in found])
    if found:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for weight, (rows, values), size in zip(weights, found, largest.tolist(), strict=True):
        values, rows = gather_rows(values.mul_(1.0 / dist.get_world_size(group)), rows, size, group)
        is_row = rows != PADDING_ID
        weight.grad = torch.sparse_coo_tensor(rows[is_row][None], values[is_row], weight.shape, check_invariants=False)
