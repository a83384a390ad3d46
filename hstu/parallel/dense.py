"""Data parallelism of the dense part.

The gradient of the loss ``local sum / global number of labels × data-parallel size`` is averaged over ranks here by
DDP and in TorchRec's exchange for the tables, so an update is that of the mean over the global batch.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hstu.model.gr_model import GRModel
from hstu.parallel.mesh import Mesh


def replicate_dense(model: GRModel, mesh: Mesh) -> GRModel:
    """Wrap ``model.dense`` (replicated tables included) in DDP over the data-parallel group; at size 1 nothing is done.

    Every parameter gets a gradient on every rank (DenseModel sees to it for batches without labels), so DDP need not
    search for unused ones.
    """
    if mesh.dp_size > 1:
        model.dense = DistributedDataParallel(
            model.dense, process_group=mesh.dp_group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return model


def unwrap_dense(model: GRModel) -> nn.Module:
    """The dense part without its DDP wrapper: parameter names do not depend on the number of ranks."""
    dense = model.dense
    return dense.module if isinstance(dense, DistributedDataParallel) else dense
