"""Data parallelism of the dense part.

A rank's loss is ``local sum / global number of labels × data-parallel size``. DDP averages its gradient over ranks, and
TorchRec does so for the tables, so updates use the gradient of the mean over the global batch.
"""

# No `from __future__ import annotations`: DDP inspects the annotations of the communication hook.

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

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
    """DDP that checks this rank's gradients before averaging, when a nan still shows the rank it comes from."""

    def __init__(self, dense: nn.Module, group: dist.ProcessGroup, sent_as: torch.dtype = torch.float32) -> None:
        self._set_params_and_buffers_to_ignore_for_model(dense, sparse_tables(dense))
        super().__init__(dense, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.sent_as = sent_as
        """Dtype for exchanging gradients, which are float32 before and after."""
        self.own_buckets_finite: list[Tensor] = []
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
        self.own_buckets_finite.append(all_finite([sent]))  # if finite in this dtype, the average is finite as well
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


def unwrap_dense(model: GRModel) -> nn.Module:
    """Return the dense part without DDP wrapper: its parameter names are the same for any number of ranks."""
    dense = model.dense
    return dense.module if isinstance(dense, DistributedDataParallel) else dense


def own_gradients_finite(dense: nn.Module) -> Tensor:
    """Return whether this rank's dense gradients were finite before averaging: bool scalar. Call after backward."""
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
