"""The reference pipeline: one batch after the other, nothing overlaps.

Stages, all on the default stream: copy batch i → embeddings → dense forward → backward → step.
"""

from __future__ import annotations

from collections.abc import Iterator

from hstu.data.batch import HSTUBatch
from hstu.pipeline.base import StepResult, TrainPipeline


class SequentialPipeline(TrainPipeline):
    """pipeline_type = "none"."""

    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """See TrainPipeline.progress."""
        batch = next(batches).to(self.mesh.device, non_blocking=True)
        self.zero_grad()
        loss, result = self.forward(batch)
        loss.backward()
        self.step()
        return result
