"""Data parallelism of the dense part.

The gradient of the loss ``local sum / global number of labels × data-parallel size`` is averaged over ranks here by
DDP and in TorchRec's exchange for the tables, so an update is that of the mean over the global batch.
"""

# No postponed annotations: DDP looks at those of the hook that it is given.

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hstu.model.gr_model import GRModel
from hstu.parallel.mesh import Mesh


class ReplicatedDense(DistributedDataParallel):
    """DDP that also looks at what this rank itself adds to each average: afterwards no one can tell whose nan it is."""

    def __init__(self, dense: nn.Module, group: dist.ProcessGroup, sent_as: torch.dtype = torch.float32) -> None:
        super().__init__(dense, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.sent_as = sent_as
        """Type in which gradients, float32 before and after, are exchanged."""
        self.own_buckets_finite: list[Tensor] = []
        """Of each bucket since ``clear``, in the order in which they were averaged: bool scalars on the device."""
        self.register_comm_hook(self, _average_bucket)

    def average_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to average what DDP has just filled; the averages."""
        gradients, group = bucket.buffer(), self.process_group
        sent = gradients.to(self.sent_as)  # itself, if that is its type
        self.own_buckets_finite.append(all_finite([sent]))  # none is above the type's largest number, nor the average
        sent.mul_(1.0 / dist.get_world_size(group))  # as DDP does by itself, with the same bits
        averaged = dist.all_reduce(sent, group=group, async_op=True).get_future()
        if sent is gradients:
            return averaged.then(lambda done: done.value()[0])
        return averaged.then(lambda done: gradients.copy_(done.value()[0]))


def _average_bucket(dense: ReplicatedDense, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return dense.average_bucket(bucket)


def replicate_dense(model: GRModel, mesh: Mesh, sent_as: torch.dtype = torch.float32) -> GRModel:
    """Wrap ``model.dense`` (replicated tables included) in DDP over the data-parallel group; at size 1 nothing is done.

    ``sent_as``: see ReplicatedDense.

    Every parameter gets a gradient on every rank (DenseModel sees to it for batches without labels), so DDP need not
    search for unused ones.
    """
    if mesh.dp_size > 1:
        model.dense = ReplicatedDense(model.dense, mesh.dp_group, sent_as)
    return model


def unwrap_dense(model: GRModel) -> nn.Module:
    """The dense part without its DDP wrapper: parameter names do not depend on the number of ranks."""
    dense = model.dense
    return dense.module if isinstance(dense, DistributedDataParallel) else dense


def own_gradients_finite(dense: nn.Module) -> Tensor:
    """After backward: whether this rank's gradients of the dense part were finite before any average; bool scalar."""
    if isinstance(dense, ReplicatedDense):
        buckets, dense.own_buckets_finite = dense.own_buckets_finite, []
        return torch.stack(buckets).all()
    return all_finite([parameter.grad for parameter in dense.parameters() if parameter.grad is not None])


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all numbers are finite, as a bool scalar on the device; nothing waits for it.

    By their sum, which an infinity or a nan spoils: one pass over each tensor, many times as fast as isfinite.
    """
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return torch.stack(sums).sum().isfinite() if sums else torch.tensor(True)
