"""pipeline_type = "native": the copy to the device and the exchange of ids run ahead of the step.

While batch i is trained on:

    batch i + 2   next(batches), copy to the device       memcpy stream
    batch i + 1   ids to the ranks that own their rows    data-dist stream (sizes before the step, ids in ``overlap``)
    batch i       train_step                              default stream

Only ids are exchanged ahead. Rows are looked up in step i, after the update of step i - 1, so the losses are those of
"none", bit for bit. On a CPU there are no copies and no streams; with several ranks the exchange still overlaps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torchrec.distributed.model_parallel import ShardedModule
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.train_batch import TrainBatch
from hstu.pipeline.none import TrainPipeline
from hstu.pipeline.step import StepResult, TrainStep

log = logging.getLogger(__name__)


class NativeStages(TrainPipelineSparseDist[TrainBatch, StepResult]):
    """TorchRec's stages around our step, also for models without a sharded table.

    TorchRec 1.6 to 1.8 traces through such models to the last operator (it stops only at modules *beside* a sharded
    one), and fails in any dense model. tests/pipeline/test_defects.py fails once that is fixed.
    """

    def __init__(self, step: TrainStep) -> None:
        no_optimizer = cast(torch.optim.Optimizer, None)  # the step has its own
        super().__init__(model=step.model, optimizer=no_optimizer, device=step.mesh.device)
        self._step = step

    def progress(self, batches: Iterator[TrainBatch]) -> StepResult:
        """TorchRec's order of stages, with the whole step in the place of forward, backward and optimizer."""
        self.fill_pipeline(batches)
        if not self.batches:
            raise StopIteration
        self._set_module_context(self.contexts[0])
        self._wait_for_batch()
        if len(self.batches) >= 2:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])  # sizes
        self.enqueue_batch(batches)
        result = self._step(cast(TrainBatch, self.batches[0]), overlap=self._overlap)
        self.dequeue_batch()
        return result

    def _overlap(self) -> None:
        if len(self.batches) >= 2:
            self.wait_sparse_data_dist(self.contexts[1])  # sizes are there: ids follow

    def _pipeline_model(self, batch: Any, context: Any, *args: Any, **options: Any) -> None:
        if any(isinstance(module, ShardedModule) for module in self._model.modules()):
            super()._pipeline_model(batch, context, *args, **options)
        else:  # no ids to send, but the stream waits for the copy, and the step for the stream
            self.start_sparse_data_dist(batch, context)


class NativePipeline(TrainPipeline):
    """Overlaps by TorchRec's TrainPipelineSparseDist."""

    name = "native"
    stages: type[NativeStages] = NativeStages

    def __init__(self, step: TrainStep, num_micro_batches: int = 1) -> None:
        super().__init__(step, num_micro_batches)
        self._batches: Iterator[HSTUBatch] | None = None
        self._train_batches: Iterator[TrainBatch] = iter(())
        self._stages = self.stages(step)
        if step.mesh.device.type == "cpu":
            log.info("pipeline_type %r on a CPU: no copy and no cache, only the exchange of ids overlaps", self.name)

    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """See TrainPipeline.progress. Raises ValueError for other ``batches`` while some of the former wait."""
        if batches is not self._batches:
            if self._stages.batches:
                # TorchRec would train on those, then fail for want of the new one's ids.
                raise ValueError(
                    f"{len(self._stages.batches)} batches of another iterator are in the pipeline: go on with that one "
                    "until it raises StopIteration"
                )
            self._batches, self._train_batches = batches, map(self._train_batch, batches)
        return self._stages.progress(self._train_batches)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """See TrainPipeline.evaluation."""
        self._stages.detach()
        try:
            yield
        finally:
            # Without sparse_dist=False, TorchRec sends the ids of the waiting batch a second time and loses the sizes
            # of the first exchange, which the look-up then lacks (tests/pipeline/test_defects.py).
            self._stages.attach(sparse_dist=False)
