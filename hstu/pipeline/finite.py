"""A loss or a gradient that is not finite: no table, no weight and no checkpoint sees the step.

The run ends there, but where the gradients alone have overflowed a loss scale that can be lowered: then the step is
skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hstu.config.errors import UserError
from hstu.data.batch import HSTUBatch
from hstu.optim.loss_scale import LossScale
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh

_SHOWN_USERS = 5


class NonFiniteStep(UserError):
    """Raised on all ranks alike."""


class StepCheck:
    """Looks at each step when the dense part has its gradients and the tables have not seen theirs yet.

    A CPU raises right there. A GPU is behind its host, which waits in ``end`` while the tables' backward is under way:
    that updates tables, hence ``masked``: their gradients are zero where anything is not finite. That suits the end of
    a run, but not one that goes on, as zeros move Adam's moments: a loss scale that may shrink waits before it.
    """

    def __init__(self, mesh: Mesh, loss_scale: LossScale | None = None) -> None:
        self.mesh = mesh
        self.loss_scale = loss_scale
        may_skip = loss_scale is not None and loss_scale.is_dynamic
        self.after_backward = mesh.device.type == "cuda" and not may_skip
        self.overflowed = False
        """Whether the step is to be skipped, on all ranks alike."""
        self._finite: Tensor | None = None
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._own: tuple[Tensor, Tensor] | None = None
        self._batch: HSTUBatch | None = None

    def begin(self, loss_sum: Tensor, gradients_finite: Tensor, batch: HSTUBatch) -> Tensor:
        """``loss_sum`` over the data-parallel ranks; takes note whether all is finite. Collective.

        loss_sum: float32 scalar; gradients_finite: bool scalar: of this rank, before anything is averaged. Raises
        NonFiniteStep unless that is for ``end`` to do.
        """
        totals = torch.stack([loss_sum, (~gradients_finite).float()])
        if self.mesh.dp_size > 1:
            dist.all_reduce(totals, group=self.mesh.dp_group)
        total_loss, wrong = totals[0], torch.stack([(~totals[0].isfinite()).float(), totals[1]])
        if self.mesh.tp_size > 1:  # the ranks of a group compute the same loss each by itself
            dist.all_reduce(wrong, group=self.mesh.tp_group)
        right = wrong == 0
        self._finite, self._own, self._batch = right.all(), (loss_sum, gradients_finite), batch
        self._on_host = right.to("cpu", non_blocking=True)  # page-locked, if it comes from a GPU
        if right.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        if not self.after_backward:
            self.end()
        return total_loss

    def masked(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients for the tables: these, or zeros where the host does not know yet that the step is none."""
        if not self.after_backward:
            return gradients
        assert self._finite is not None
        return [torch.where(self._finite, gradient, 0) for gradient in gradients]

    def end(self) -> None:
        """Before anything is done that lasts. Raises NonFiniteStep, on all ranks alike."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._on_host is None:
            return
        loss_finite, gradients_finite = self._on_host.tolist()
        may_skip = self.loss_scale is not None and self.loss_scale.can_shrink
        self.overflowed = loss_finite and not gradients_finite and may_skip
        if not ((loss_finite and gradients_finite) or self.overflowed):
            raise NonFiniteStep(self._report())

    def _report(self) -> str:
        assert self._own is not None and self._batch is not None
        users = self._batch.user_ids.tolist()[: self._batch.real_batch_size]
        loss, gradients_finite = (tensor.item() for tensor in self._own)
        told = gather_objects((float(loss), bool(gradients_finite), users), self.mesh.world_group)
        lost = [
            f"{loss} {_place(rank, users)}" for rank, (loss, _, users) in enumerate(told) if not math.isfinite(loss)
        ]
        bad = [f"nan or inf {_place(rank, users)}" for rank, (_, finite, users) in enumerate(told) if not finite]
        what, where = ("gradient", bad) if bad and not lost else ("loss", lost)
        scale = "" if self.loss_scale is None or lost else _told_of(self.loss_scale)
        return (
            f"the {what} is not finite at iteration {self.mesh.progress.iteration}: "
            f"{'; '.join(where) or 'the sum over the ranks, on none of them'}. Nothing was updated by this step. Lower "
            "OptimizerArgs.learning_rate, warm up (LRScheduleArgs.warmup_iters), clip (TrainerArgs.max_grad_norm) or "
            f"use float32{scale}"
        )


def _told_of(loss_scale: LossScale) -> str:
    if loss_scale.is_dynamic:
        return f". The loss scale is at its lowest, {loss_scale.value:g}: bfloat16 holds numbers that float16 does not"
    return f'. PrecisionArgs.loss_scale = {loss_scale.value:g} is fixed: lower it, or leave it to "dynamic"'


def _place(rank: int, users: Sequence[int]) -> str:
    shown = ", ".join(map(str, users[:_SHOWN_USERS]))
    more = ", …" if len(users) > _SHOWN_USERS else ""
    return f"on rank {rank}, whose batch has the users in rows {shown}{more} of the data"
