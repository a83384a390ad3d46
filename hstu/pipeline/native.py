"""The exchange of ids and the copy to the device run ahead of the step, on TorchRec's TrainPipelineSparseDist.

While batch i is trained on:

    batch i + 2   next(batches), copy to the device     memcpy stream
    batch i + 1   ids to the ranks that own their rows   data-dist stream (sizes before forward, ids behind it)
    batch i       look-up, forward, backward, step       default stream

Only ids are exchanged ahead, no row is read: rows are looked up in forward i, after the update of step i - 1, so the
losses are those of "none", bit for bit. zero_grad comes before forward, as the fused tables ask. On a CPU there are
no copies and no streams; with several ranks the exchange still goes on behind the forward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torchrec.distributed.model_parallel import ShardedModule
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from hstu.data.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.optim.loss_scale import LossScale
from hstu.optim.optimizers import Optimizers
from hstu.parallel.mesh import Mesh
from hstu.pipeline.base import StepResult, TrainPipeline

log = logging.getLogger(__name__)


class NativeStages(TrainPipelineSparseDist[HSTUBatch, StepResult]):
    """TorchRec's stages, for models without a sharded table, too.

    torchrec 1.8.0 traces through those to the last operator (it stops at modules *beside* a sharded one only), which
    no dense model survives; tests/pipeline/test_defects.py tells when that is fixed.
    """

    def _pipeline_model(self, batch: Any, context: Any, *args: Any, **options: Any) -> None:
        if any(isinstance(module, ShardedModule) for module in self._model.modules()):
            super()._pipeline_model(batch, context, *args, **options)
        else:  # no ids to send, but a stream that waits for the copy, and for which the step waits
            self.start_sparse_data_dist(batch, context)


class NativePipeline(TrainPipeline):
    """pipeline_type = "native"."""

    stages: type[NativeStages] = NativeStages
    cpu_notice = "pipeline_type 'native' on a CPU: there is no copy to overlap, only the ranks' exchange of ids"

    def __init__(
        self,
        model: GRModel,
        optimizers: Optimizers,
        mesh: Mesh,
        max_grad_norm: float,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(model, optimizers, mesh, max_grad_norm, loss_scale)
        self._batches: Iterator[HSTUBatch] | None = None
        self._stages = self.stages(
            model=model,
            optimizer=cast(torch.optim.Optimizer, self),  # only zero_grad and step are called
            device=mesh.device,
            custom_model_fwd=cast(Any, self.forward),  # with a batch, never with None
        )
        if mesh.device.type == "cpu":
            log.info(self.cpu_notice)

    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """See TrainPipeline.progress. Raises ValueError for other ``batches`` while some of the former wait."""
        if self._stages.batches and batches is not self._batches:
            # TorchRec 1.8.0 would train on those, then fail for want of the new one's ids.
            raise ValueError(
                f"{len(self._stages.batches)} batches of another iterator are in the pipeline: go on with that one "
                "until it raises StopIteration"
            )
        self._batches = batches
        return self._stages.progress(batches)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """See TrainPipeline.evaluation."""
        self._stages.detach()
        try:
            yield
        finally:
            # Without sparse_dist=False, TorchRec 1.8.0 sends the ids of the waiting batch a second time and loses the
            # sizes of the first exchange, which the look-up then lacks (tests/pipeline/test_defects.py).
            self._stages.attach(sparse_dist=False)
