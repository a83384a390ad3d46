"""What every train pipeline does, whatever it overlaps: one iterator in, one optimizer step out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hstu.data.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.model.outputs import ModelOutput
from hstu.optim.loss_scale import LossScale
from hstu.optim.optimizers import Optimizers
from hstu.parallel.dense import ReplicatedDense, all_finite, own_gradients_finite
from hstu.parallel.mesh import Mesh
from hstu.pipeline.boundary import Boundary
from hstu.pipeline.finite import StepCheck

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step.

    loss: mean over the labelled tokens of the *global* batch, fp32 scalar on the device, equal on all ranks.
    batch: what was trained on; its ``position`` is where a resumed run goes on.
    """

    loss: torch.Tensor
    batch: HSTUBatch


class TrainPipeline(ABC):
    """Turns batches into optimizer steps. The trainer never knows which kind it has."""

    def __init__(
        self,
        model: GRModel,
        optimizers: Optimizers,
        mesh: Mesh,
        max_grad_norm: float,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.mesh = mesh
        self.max_grad_norm = max_grad_norm
        self.loss_scale = loss_scale
        self.check = StepCheck(mesh, loss_scale)

    @abstractmethod
    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """Train on the next batch. Raises StopIteration once all of ``batches`` have been trained on."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Between two steps: inside, the model's forward serves any batch, as if there were no pipeline.

        What has been fetched ahead stays, untouched by what happens inside, and is trained on afterwards.
        """
        return nullcontext()

    def forward(self, batch: HSTUBatch) -> tuple[torch.Tensor, StepResult]:
        """Train the dense part on a batch on the device as far as its gradients, which then wait for ``step``.

        Returns (what to call backward on, for the gradients to reach the tables; what ``progress`` returns). May raise
        NonFiniteStep.
        """
        boundary = Boundary(self.model.look_up(batch), batch)
        loss_sum, count = self.differentiate(boundary, batch)
        gradients = boundary.gradients()
        finite = all_finite(gradients).logical_and(own_gradients_finite(self.model.dense))
        result = StepResult(self.check.begin(loss_sum, finite, batch) / count, batch)
        if self.check.overflowed:
            return boundary.keep_back(), result
        gradients = self.check.masked(gradients)
        if self.loss_scale is not None and gradients:
            gradients = list(torch._foreach_mul(gradients, 1.0 / self.loss_scale.value))
        return boundary.hand_back(gradients), result

    def differentiate(self, boundary: Boundary, batch: HSTUBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of the dense part: (this rank's summed loss, labels of the global batch), scalars.

        DDP and TorchRec average gradients over ranks, so the local sum is divided by the global count of labelled
        tokens and multiplied by the data-parallel size: the gradient is then the single-process one, however the
        global batch is split, over ranks and into micro-batches. It is that of the loss times the loss scale, if there
        is one. The count stays on the device: no host synchronisation.
        """
        count = batch.computed.num_labels.sum().float()
        if self.mesh.dp_size > 1:
            dist.all_reduce(count, group=self.mesh.dp_group)
        count = count.clamp(min=1.0)
        factor = self.mesh.dp_size * (self.loss_scale.value if self.loss_scale is not None else 1)
        loss_sum = torch.zeros((), device=count.device)
        for number, (rows, part) in enumerate(boundary.parts(), 1):
            with self._averaging(number == boundary.num_parts):
                output: ModelOutput = self.model.dense([rows], part)
                (output.loss_sum * (factor / count)).backward()
            loss_sum += output.loss_sum.detach().float()
            self.mesh.progress.alive()
        return loss_sum, count

    def _averaging(self, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over ranks once a step, when those of all micro-batches are summed."""
        dense = self.model.dense
        return nullcontext() if is_last or not isinstance(dense, ReplicatedDense) else dense.no_sync()

    def zero_grad(self) -> None:
        """Before a step's look-ups in the tables."""
        self.optimizers.zero_grad()

    def step(self) -> None:
        """After the tables' backward, which may have updated them: clip, then the dense step; or nothing, after an
        overflow.

        May raise NonFiniteStep, before it.
        """
        self.check.end()
        if self.loss_scale is not None and not self._unscale(self.loss_scale):
            return
        if self.max_grad_norm > 0:
            self.optimizers.clip_grad_norm(self.max_grad_norm)
        self.optimizers.step()

    def _unscale(self, scale: LossScale) -> bool:
        """Make the dense gradients those of the loss, and the scale that of the next step. False: skip this one."""
        used = scale.value
        if self.check.overflowed:
            scale.skip()
            where, now = self.mesh.progress.iteration, scale.value
            log.info("gradients overflow at iteration %d: skipped, loss scale %g → %g", where, used, now)
            return False
        self.optimizers.scale_gradients(1.0 / used)
        scale.proceed()
        return True
