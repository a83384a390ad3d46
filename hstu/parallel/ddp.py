"""Data parallelism of the dense part.

The gradient of the loss ``local sum / global number of labels × data-parallel size`` is averaged over ranks here by
DDP and in TorchRec's exchange for the tables, so an update is that of the mean over the global batch.
"""

# No postponed annotations: DDP inspects those of the communication hook.

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hstu.model.embedding import ReplicatedTables
from hstu.model.gr_model import GRModel
from hstu.ops.row_update import sum_by_row
from hstu.parallel.collectives import PADDING_ID, gather_rows
from hstu.parallel.fsdp import fully_sharded
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import all_finite, numbers_of


class ReplicatedDense(DistributedDataParallel):
    """DDP that also checks this rank's gradients before they are averaged: a nan then still shows its rank."""

    def __init__(self, dense: nn.Module, group: dist.ProcessGroup, sent_as: torch.dtype = torch.float32) -> None:
        self._set_params_and_buffers_to_ignore_for_model(dense, sparse_tables(dense))
        super().__init__(dense, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.sent_as = sent_as
        """Dtype in which gradients are exchanged. They are float32 before and after."""
        self.own_buckets_finite: list[Tensor] = []
        """One bool scalar on the device per bucket averaged in this step."""
        self.register_comm_hook(self, ReplicatedDense.average_bucket)
        # By default DDP orders its buckets anew after the first step, and the order of the terms of a sum over three or
        # more ranks depends on the place in a bucket. A resumed run would differ in its last bits from one that never
        # stopped.
        self.reducer._push_all_rebuilt_params()  # as if all gradients had arrived in the order of the reducer

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """Last parameters first, as their gradients arrive."""
        parameters, expect_sparse_gradient = super()._build_params_for_reducer()
        return parameters[::-1], expect_sparse_gradient[::-1]

    def average_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start to average a bucket that DDP has filled; returns a future of the averages."""
        gradients, group = bucket.buffer(), self.process_group
        sent = gradients.to(self.sent_as)  # no copy if the dtype is the same
        self.own_buckets_finite.append(all_finite([sent]))  # finite in this dtype; then the average is finite, too
        sent.mul_(1.0 / dist.get_world_size(group))  # the same bits as DDP's own averaging
        averaged = dist.all_reduce(sent, group=group, async_op=True).get_future()
        if sent is gradients:
            return averaged.then(lambda done: done.value()[0])
        return averaged.then(lambda done: gradients.copy_(done.value()[0]))


def replicate_dense(model: GRModel, mesh: Mesh, sent_as: torch.dtype = torch.float32) -> GRModel:
    """Wrap ``model.dense`` in DDP over the ranks with equal dense weights, if there are several.

    Every parameter gets a gradient on every rank (see DenseModel), so DDP need not search for unused parameters. For
    replicated tables with sparse gradients see :func:`average_sparse_gradients`. ``sent_as``: see ReplicatedDense.
    """
    if mesh.dp_cp_size > 1:
        model.dense = ReplicatedDense(model.dense, mesh.dp_cp_group, sent_as)
    return model


def unwrap_dense(model: GRModel) -> nn.Module:
    """The dense part without its DDP wrapper, so that parameter names do not depend on the number of ranks."""
    dense = model.dense
    return dense.module if isinstance(dense, DistributedDataParallel) else dense


def own_gradients_finite(dense: nn.Module) -> Tensor:
    """After backward: whether this rank's gradients of the dense part are finite before averaging; bool scalar."""
    gradients = [parameter.grad for parameter in dense.parameters() if parameter.grad is not None]
    sharded = fully_sharded(dense)
    if sharded is not None:
        checked, sharded.own_units_finite = sharded.own_units_finite, []
        rest = [numbers_of(gradient) for gradient in gradients if not isinstance(gradient, DTensor)]
    elif isinstance(dense, ReplicatedDense):
        checked, dense.own_buckets_finite = dense.own_buckets_finite, []
        rest = [numbers_of(gradient) for gradient in gradients if gradient.is_sparse]
    else:
        return all_finite([numbers_of(gradient) for gradient in gradients])
    return torch.stack([*checked, *([all_finite(rest)] if rest else [])]).all()


def sparse_tables(dense: nn.Module) -> list[str]:
    """Names of the weights whose gradients are sparse."""
    return [
        f"{name}.{weight_name}"
        for name, part in dense.named_modules()
        if isinstance(part, ReplicatedTables)
        for weight_name, weight in part.named_parameters()
        if weight.device.type == "cpu"
    ]


@contextmanager
def gradient_sync(dense: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Around a micro-batch: gradients are averaged once per step, after they are summed over all micro-batches."""
    if isinstance(dense, FSDPModule):
        dense.set_requires_gradient_sync(is_last)
    with dense.no_sync() if isinstance(dense, ReplicatedDense) and not is_last else nullcontext():
        yield


def average_sparse_gradients(dense: nn.Module) -> None:
    """After own_gradients_finite: average the gradients that DDP or FSDP has not averaged. Collective.

    Of sparse ones each rank gets the others' rows, where DDP would add up whole tables. The rows of the ranks follow
    each other, so all ranks sum them in one order.
    """
    if isinstance(dense, ReplicatedDense):
        group, module = dense.process_group, dense.module
    elif sharded := fully_sharded(dense):
        sharded.average_table_gradients()
        group, module = sharded.group, dense
    else:
        return
    for name in sparse_tables(module):
        weight = module.get_parameter(name)
        if weight.grad is None:  # no row was looked up
            weight.grad = torch.sparse_coo_tensor(
                torch.empty(1, 0, dtype=torch.int64), weight.new_empty(0, weight.shape[1]), weight.shape
            )
        rows, values = sum_by_row(weight.grad)
        values, rows = gather_rows(values.mul_(1.0 / dist.get_world_size(group)), rows, group)
        is_row = rows != PADDING_ID
        weight.grad = torch.sparse_coo_tensor(rows[is_row][None], values[is_row], weight.shape, check_invariants=False)
