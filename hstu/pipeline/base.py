"""What every train pipeline does, whatever it overlaps: one iterator in, one optimizer step out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from hstu.data.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.model.outputs import ModelOutput
from hstu.optim.optimizers import Optimizers
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import LossCheck


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

    def __init__(self, model: torch.nn.Module, optimizers: Optimizers, mesh: Mesh, max_grad_norm: float) -> None:
        self.model = model
        self.optimizers = optimizers
        self.mesh = mesh
        self.max_grad_norm = max_grad_norm
        self.loss_check = LossCheck(mesh)
        if self.loss_check.after_backward:
            cast(GRModel, model).dense.register_forward_pre_hook(self.loss_check.mask_rows)

    @abstractmethod
    def progress(self, batches: Iterator[HSTUBatch]) -> StepResult:
        """Train on the next batch. Raises StopIteration once all of ``batches`` have been trained on."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Between two steps: inside, the model's forward serves any batch, as if there were no pipeline.

        What has been fetched ahead stays, untouched by what happens inside, and is trained on afterwards.
        """
        return nullcontext()

    def forward(self, batch: HSTUBatch) -> tuple[torch.Tensor, StepResult]:
        """(loss to differentiate, what ``progress`` returns) of a batch on the device. May raise NonFiniteLoss."""
        output = self.model(batch)
        loss, mean_loss = self.normalise(output)
        self.loss_check.begin(output.loss_sum, mean_loss, batch)
        return loss, StepResult(mean_loss, batch)

    def normalise(self, output: ModelOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss to differentiate, global mean loss to report).

        DDP and TorchRec average gradients over ranks, so the local sum is divided by the global count of labelled
        tokens and multiplied by the data-parallel size: the gradient is then the single-process one, however the
        global batch is split. The count stays on the device: no host synchronisation.
        """
        totals = torch.stack([output.loss_sum.detach().float(), output.num_labels.detach().float()])
        if self.mesh.dp_size > 1:
            dist.all_reduce(totals, group=self.mesh.dp_group)
        count = totals[1].clamp(min=1.0)
        return output.loss_sum * (self.mesh.dp_size / count), totals[0] / count

    def zero_grad(self) -> None:
        """Before a step's look-ups in the tables."""
        self.optimizers.zero_grad()

    def step(self) -> None:
        """After backward, inside which model-parallel tables may have been updated: clip, then the dense step.

        May raise NonFiniteLoss, before it.
        """
        self.loss_check.end()
        if self.max_grad_norm > 0:
            self.optimizers.clip_grad_norm(self.max_grad_norm)
        self.optimizers.step()
