"""pipeline_type = "prefetch": as native, and rows that a table keeps off the device enter its cache ahead of the step.

While batch i is trained on:

    batch i + 2   next(batches), copy to the device       memcpy stream
    batch i + 1   ids to the ranks that own their rows    data-dist stream (before the step; sizes behind step i - 1)
    batch i + 1   rows into the tables' caches            prefetch stream, in ``overlap``
    batch i       train_step                              default stream

What is prefetched is the position of a row, not its value, so the losses are those of "none". Of a dynamic table the
ids of batch i + 1 are prefetched that have a row by batch i. A table that lies on the device as a whole has no cache:
its ids are exchanged as in native, one batch further ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist

from hstu.data.train_batch import TrainBatch
from hstu.pipeline.native import NativePipeline, NativeStages
from hstu.pipeline.step import StepResult


class PrefetchStages(NativeStages, PrefetchTrainPipelineSparseDist[TrainBatch, StepResult]):
    """TorchRec's stages around our step, also for CPUs and for models without a sharded table.

    Three more defects of torchrec 1.8.0 (tests/pipeline/test_defects.py fails once they are fixed): without a CUDA
    stream ``prefetch_embeddings`` returns at once and does not pass the ids on to the look-up; only its loop over the
    sharded tables makes the prefetch stream, and with it the step, wait for the copy of the batch; and the stream that
    it takes for that of forward is one of its own in which nothing ever runs.
    """

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
        if self._prefetch_stream is not None:  # the caches are at rest for an evaluation or a checkpoint
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
        if self._prefetch_stream is not None:
            self._default_stream = torch.get_device_module(self._device).current_stream()
            super()._prefetch(context)
            self._prefetch_stream.wait_stream(self._data_dist_stream)
            return
        for name in [module.forward.name for module in self._pipelined_modules]:
            context.module_input_post_prefetch[name] = context.input_dist_tensors_requests.pop(name).wait()
            context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)


class PrefetchPipeline(NativePipeline):
    """Overlaps by TorchRec's PrefetchTrainPipelineSparseDist."""

    name = "prefetch"
    stages = PrefetchStages
