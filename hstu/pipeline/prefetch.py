"""As native, and rows that a table keeps off the device are brought into its cache ahead of the step.

While batch i is trained on, on TorchRec's PrefetchTrainPipelineSparseDist:

    batch i + 2   next(batches), copy to the device      memcpy stream
    batch i + 1   ids to the ranks that own their rows   data-dist stream (before forward; sizes behind step i - 1)
    batch i + 1   rows into the tables' caches           prefetch stream, behind forward
    batch i       look-up, forward, backward, step       default stream

What is prefetched is the place of a row, not its value, so the losses are those of "none". Of a dynamic table the ids
of batch i + 1 are prefetched that have a row by batch i. A table that lies on the device as a whole has no cache: it is
served as native serves it, one batch further ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist

from hstu.data.batch import HSTUBatch
from hstu.pipeline.base import StepResult
from hstu.pipeline.native import NativePipeline, NativeStages


class PrefetchStages(NativeStages, PrefetchTrainPipelineSparseDist[HSTUBatch, StepResult]):
    """TorchRec's stages, for CPUs and for models without a sharded table, too.

    Three more defects of torchrec 1.8.0 (tests/pipeline/test_defects.py tells when they are fixed): without a CUDA
    stream ``prefetch_embeddings`` returns at once and does not hand the ids on to the look-up; it is only its loop over
    the sharded tables that makes the prefetch stream, and with it forward, wait for the copy of the batch; and the
    stream that it calls forward's is one of its own in which nothing ever runs, so that waiting for it is not waiting.
    """

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
    """pipeline_type = "prefetch"."""

    stages = PrefetchStages
    cpu_notice = (
        "pipeline_type 'prefetch' on a CPU: no table has a cache and there is no copy to overlap, only the ranks' "
        "exchange of ids"
    )

    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """See TrainPipeline.progress. What comes next, an evaluation or a checkpoint, say, finds the caches at rest."""
        result = super().progress(batches)
        stream = cast(PrefetchStages, self._stages)._prefetch_stream  # the next forward would wait for it, too
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        return result
