"""The interface of the pipelines, and pipeline_type = "none": one batch after the other, without overlap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.train_batch import TrainBatch
from hstu.parallel.group import to_train_batch
from hstu.pipeline.step import StepResult, TrainStep


class TrainPipeline(ABC):
    """Turns batches into optimizer steps. The trainer does not depend on the kind of overlap."""

    def __init__(self, step: TrainStep, num_micro_batches: int = 1) -> None:
        self.step = step
        self.num_micro_batches = num_micro_batches

    @abstractmethod
    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """Train on the next batch, which is on the host.

        Raises StopIteration once all of ``batches`` have been trained on. Raises NonFiniteStep, see FiniteCheck.
        """

    def evaluation(self) -> AbstractContextManager[None]:
        """Inside, between two steps, the model's forward serves any batch.

        Batches that have been fetched ahead are kept, and trained on afterwards.
        """
        return nullcontext()

    def resolve(self) -> None:
        """Wait until the last step is known to be finite. Call it before the step is logged, evaluated or saved.

        Raises NonFiniteStep on all ranks alike.
        """
        self.step.check.resolve()

    def _train_batch(self, batch: HSTUBatch) -> TrainBatch:
        return to_train_batch(batch, self.step.model.roles, self.step.mesh, self.num_micro_batches)


class SequentialPipeline(TrainPipeline):
    """The reference: copy batch i → train on batch i, all on the default stream."""

    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """See TrainPipeline.progress."""
        batch = self._train_batch(next(batches)).to(self.step.mesh.device, non_blocking=True)
        return self.step(batch)
