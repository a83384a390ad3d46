"""Pipelines of TrainerArgs.pipeline_type, which overlap a training step with the loading of later batches.

While "native" trains on batch i, batch i + 1 sends its ids to the ranks that own their rows (data-dist stream), and
batch i + 2 is loaded and copied to the device (memcpy stream). "prefetch" also loads rows of batch i + 1 that are
stored off the device into the caches of their tables (prefetch stream).

Losses equal "none" bit for bit. Rows are looked up in step i, after the update of step i - 1: prefetching determines
the position of a row, not its value. For dynamic tables it covers ids of batch i + 1 that have a row by batch i.
A CPU has no copies and no streams; with several ranks the id exchange still overlaps.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torchrec.distributed.model_parallel import ShardedModule
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import PrefetchTrainPipelineContext
from torchrec.distributed.train_pipeline.runtime_forwards import PrefetchPipelinedForward
from torchrec.distributed.train_pipeline.utils import _prefetch_embeddings

from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.train_batch import TrainBatch
from hstu.parallel.group import to_train_batch
from hstu.pipeline.step import StepResult, TrainStep

log = logging.getLogger(__name__)


class TrainPipeline(ABC):
    """Trains on batches. The trainer is independent of the kind of overlap."""

    def __init__(self, step: TrainStep, num_micro_batches: int = 1) -> None:
        self.step = step
        self.num_micro_batches = num_micro_batches

    @abstractmethod
    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """Train on the next host batch. Raises StopIteration after the last batch; NonFiniteStep: see FiniteCheck."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Context between two steps in which the model's forward accepts any batch. Keeps batches fetched ahead."""
        return nullcontext()

    def resolve(self) -> None:
        """Wait for the last step's check, before logging, evaluating or saving. Raises NonFiniteStep on all ranks."""
        self.step.check.resolve()

    def _train_batch(self, batch: HSTUBatch) -> TrainBatch:
        return to_train_batch(batch, self.step.model.roles, self.step.mesh, self.num_micro_batches)


class SequentialPipeline(TrainPipeline):
    """pipeline_type = "none", the reference: copy batch i, then train on it, all on the default stream."""

    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """See TrainPipeline.progress."""
        return self.step(self._train_batch(next(batches)).to(self.step.mesh.device, non_blocking=True))


class NativeStages(TrainPipelineSparseDist[TrainBatch, StepResult]):
    """TorchRec's stages around ``TrainStep``, also for models without a sharded table.

    TorchRec 1.6 to 1.8 fails to trace such models; tests/pipeline/test_pipelines.py fails once that is fixed.
    """

    def __init__(self, step: TrainStep) -> None:
        no_optimizer = cast(torch.optim.Optimizer, None)  # the step has its own
        super().__init__(model=step.model, optimizer=no_optimizer, device=step.mesh.device)
        self._step = step

    def progress(self, batches: Iterator[TrainBatch]) -> StepResult:
        """TorchRec's order of stages, with ``TrainStep`` instead of forward, backward and optimizer."""
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
        else:  # no ids to send, but the step waits for the stream, and the stream for the copy
            self.start_sparse_data_dist(batch, context)


class NativePipeline(TrainPipeline):
    """pipeline_type = "native": overlaps by TorchRec's TrainPipelineSparseDist."""

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
        """See TrainPipeline.progress. Raises ValueError for a new iterator while batches of the previous one wait."""
        if batches is not self._batches:
            if self._stages.batches:
                # TorchRec would train on the waiting batches, then fail because the new batch's ids are missing.
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
            # Without sparse_dist=False, TorchRec resends the ids of the waiting batch and loses the sizes of the first
            # exchange, which the look-up needs (tests/pipeline/test_pipelines.py).
            self._stages.attach(sparse_dist=False)


class PrefetchStages(NativeStages):
    """TorchRec's stages of "native", with a prefetch between them.

    TorchRec's PrefetchTrainPipelineSparseDist is unsuitable: 1.6.1 keeps the prefetched ids of one batch only, and
    1.8.0 passes none on without a CUDA stream. The components used here are the same in these releases.
    """

    _pipelined_forward_type = PrefetchPipelinedForward

    def __init__(self, step: TrainStep) -> None:
        super().__init__(step)
        self._context_type = PrefetchTrainPipelineContext
        on_gpu = self._device.type == "cuda"
        self._prefetch_stream = torch.get_device_module(self._device).Stream() if on_gpu else None

    def fill_pipeline(self, batches: Iterator[TrainBatch]) -> None:
        """Fetch the first two batches: rows of the first enter the caches, the second exchanges sizes."""
        is_first = not self.batches
        super().fill_pipeline(batches)
        if is_first and self.batches:
            self._prefetch(self.contexts[0])
        if is_first and len(self.batches) >= 2:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])

    def progress(self, batches: Iterator[TrainBatch]) -> StepResult:
        """See NativeStages.progress."""
        self.fill_pipeline(batches)
        if not self.batches:
            raise StopIteration
        self._set_module_context(self.contexts[0])
        self._wait_for_batch()
        self.enqueue_batch(batches)
        if len(self.batches) >= 2:
            self.wait_sparse_data_dist(self.contexts[1])  # sizes are there: ids follow
        result = self._step(cast(TrainBatch, self.batches[0]), overlap=self._overlap)
        if len(self.batches) >= 3:
            self.start_sparse_data_dist(self.batches[2], self.contexts[2])  # sizes
        self.dequeue_batch()
        if self._prefetch_stream is not None:  # an evaluation or a checkpoint needs caches at rest
            torch.cuda.current_stream().wait_stream(self._prefetch_stream)
        return result

    def _wait_for_batch(self) -> None:
        if self._prefetch_stream is not None:
            stream = torch.cuda.current_stream()
            stream.wait_stream(self._prefetch_stream)
            cast(TrainBatch, self.batches[0]).record_stream(stream)

    def _overlap(self) -> None:
        used: Any = self.contexts[0]
        used.module_input_post_prefetch.clear()  # frees their memory for the next batch
        used.module_contexts_post_prefetch.clear()
        if len(self.batches) >= 2:
            self._prefetch(self.contexts[1])

    def _prefetch(self, context: Any) -> None:
        forward = None if self._prefetch_stream is None else torch.get_device_module(self._device).current_stream()
        with self._stream_context(self._prefetch_stream):
            ids_of_tables = _prefetch_embeddings(
                None,  # the batch: unused
                context,
                self._pipelined_modules,
                self._device,
                self._stream_context,
                self._data_dist_stream,
                forward,
            )
        for name, ids in ids_of_tables.items():
            context.module_input_post_prefetch[name] = ids
            context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)
        if self._prefetch_stream is not None:  # so the step waits for the batch's copy, even without tables
            self._prefetch_stream.wait_stream(self._data_dist_stream)


class PrefetchPipeline(NativePipeline):
    """pipeline_type = "prefetch": adds TorchRec's prefetch to native."""

    name = "prefetch"
    stages = PrefetchStages
