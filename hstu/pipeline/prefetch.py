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
from torchrec.distributed.train_pipeline.pipeline_context import PrefetchTrainPipelineContext
from torchrec.distributed.train_pipeline.runtime_forwards import PrefetchPipelinedForward
from torchrec.distributed.train_pipeline.utils import _prefetch_embeddings

from hstu.data.batches.train_batch import TrainBatch
from hstu.pipeline.native import NativePipeline, NativeStages
from hstu.pipeline.step import StepResult, TrainStep


class PrefetchStages(NativeStages):
    """TorchRec's stages of "native", and between them the prefetch.

    TorchRec's own class, PrefetchTrainPipelineSparseDist, cannot serve: torchrec 1.6.1 keeps the prefetched ids of one
    batch only, and torchrec 1.8.0 passes none on without a CUDA stream, and records as the stream of forward one in
    which nothing runs. What it is made of is the same in all releases.
    """

    _pipelined_forward_type = PrefetchPipelinedForward

    def __init__(self, step: TrainStep) -> None:
        super().__init__(step)
        self._context_type = PrefetchTrainPipelineContext
        on_gpu = self._device.type == "cuda"
        self._prefetch_stream = torch.get_device_module(self._device).Stream() if on_gpu else None

    def fill_pipeline(self, batches: Iterator[TrainBatch]) -> None:
        """Take the first two batches: rows of the first enter the caches, and sizes of the second are exchanged."""
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
        if self._prefetch_stream is not None:  # with it the step waits for the copy of the batch, also without tables
            self._prefetch_stream.wait_stream(self._data_dist_stream)


class PrefetchPipeline(NativePipeline):
    """Overlaps as native does, and by TorchRec's prefetch."""

    name = "prefetch"
    stages = PrefetchStages
