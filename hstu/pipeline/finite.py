"""Decides whether a step counts: checks for nan and inf, and the float16 loss scale. Carries stop signals."""

import logging
import math
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hstu.base.errors import UserError
from hstu.config.args import PrecisionArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.parallel.collectives import gather_objects, start_max
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Schedulers send SIGTERM, Ctrl-C sends SIGINT."""
_SHOWN_USERS = 5
INITIAL_SCALE = 65536.0
SCALE_FACTOR = 2.0
LOWEST_SCALE = 1.0
HIGHEST_SCALE = 2.0**127
"""The largest power of two in float32."""


class NonFiniteStep(UserError):
    """A loss or gradient is not finite. Raised on all ranks."""

    def __init__(self, message: str, iteration: int) -> None:
        super().__init__(message)
        self.iteration = iteration
        """1-based iteration of the step."""


class LossScale:
    """Factor that multiplies the loss of a float16 run, so that small gradients do not vanish.

    Uses the arithmetic of torch.amp.GradScaler, which detects overflow per rank when an optimizer steps. Sharded tables
    update earlier, inside backward, and all ranks must decide alike. Here the finite check decides, on the host.
    """

    def __init__(self, args: PrecisionArgs) -> None:
        self.is_dynamic = args.loss_scale in (None, "dynamic")
        self.value = INITIAL_SCALE if self.is_dynamic else float(args.loss_scale or 0)
        self._growth_interval = args.growth_interval
        self._steps_without_overflow = 0
        self._skipped_steps = 0

    @property
    def can_shrink(self) -> bool:
        """Whether a step with overflowing gradients may be skipped, because a lower scale exists."""
        return self.is_dynamic and self.value > LOWEST_SCALE

    def update(self, found_inf: bool) -> None:
        """Update after a step. ``found_inf``: gradients overflowed and it was skipped, which needs ``can_shrink``."""
        self._skipped_steps += found_inf
        self._steps_without_overflow = 0 if found_inf else self._steps_without_overflow + 1
        if found_inf:
            self.value = max(self.value / SCALE_FACTOR, LOWEST_SCALE)
        elif self.is_dynamic and self._steps_without_overflow >= self._growth_interval:
            self.value = min(self.value * SCALE_FACTOR, HIGHEST_SCALE)
            self._steps_without_overflow = 0

    def pop_skipped_steps(self) -> int:
        """Return the number of steps skipped since the last call."""
        skipped, self._skipped_steps = self._skipped_steps, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """The whole state, serializable as JSON."""
        return {
            "value": self.value,
            "steps_without_overflow": self._steps_without_overflow,
            "skipped": self._skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``. A fixed scale keeps its configured value."""
        if self.is_dynamic:
            self.value = state["value"]
        self._steps_without_overflow = state["steps_without_overflow"]
        self._skipped_steps = state["skipped"]


class FiniteCheck:
    """Checks each step between the backward of the dense part and that of the tables; the run ends at a bad step.

    On a CPU, and with a dynamic loss scale, the host waits for each check. Otherwise it runs ahead of the GPU:
    ``found_inf`` and ``mask`` make a bad step keep every weight, and the host raises at the next check or in
    ``resolve``. Call ``resolve`` before evaluating, logging or saving: zero gradients move the moments of FBGEMM's
    fused Adam. The same collective carries stop signals.
    """

    def __init__(self, mesh: Mesh, loss_scale: LossScale | None = None) -> None:
        self.mesh = mesh
        self.loss_scale = loss_scale
        self.deferred = mesh.device.type == "cuda" and not (loss_scale is not None and loss_scale.is_dynamic)
        """Whether the host reads the result of a check one step later."""
        self.found_inf: Tensor | None = None
        """If ``deferred``: float32 scalar on the device, 1 if the last checked step is not finite, else 0."""
        self.overflowed = False
        """Whether to skip the last resolved step, because its gradients overflow a dynamic loss scale."""
        self.received_signal: signal.Signals | None = None
        """The stop signal that this rank received, set by its handler."""
        self.stop_signal: signal.Signals | None = None
        """A signal that some rank had received by the last resolved step. Equal on all ranks."""
        self._pending: _Pending | None = None

    def __call__(self, loss_sums: Tensor, gradients_finite: Tensor, batch: HSTUBatch) -> Tensor:
        """Check one step and return ``loss_sums`` summed over the data-parallel ranks. Collective.

        loss_sums: ``ModelOutput.loss_sums`` of this rank. gradients_finite: bool scalar, before any averaging.
        Raises NonFiniteStep for this step, or for the previous step if ``deferred``.
        """
        self.resolve()
        received = loss_sums.new_zeros(len(STOP_SIGNALS))
        if self.received_signal is not None:
            received[STOP_SIGNALS.index(self.received_signal)] = 1.0
        totals = torch.cat([loss_sums, (~gradients_finite).float()[None], received])
        if self.mesh.dp_size > 1:
            dist.all_reduce(totals, group=self.mesh.dp_group)
        bad = torch.cat([(~totals[:1].isfinite()).float(), totals[len(loss_sums) :]])
        if self.mesh.tp_cp_size > 1:  # each rank of a group computes the same loss
            dist.all_reduce(bad, group=self.mesh.tp_cp_group)
        good = bad == 0
        self.found_inf = (~good[:2].all()).float() if self.deferred else None
        on_host = good.to("cpu", non_blocking=True)  # pinned, if copied from a GPU
        copied = torch.get_device_module(good.device).Event()
        copied.record()
        self._pending = _Pending(self.mesh.heartbeat.iteration, on_host, copied, loss_sums[0], gradients_finite, batch)
        if not self.deferred:
            self.resolve()
        return totals[: len(loss_sums)]

    def mask(self, gradients: list[Tensor]) -> list[Tensor]:
        """Table gradients: zeros on the device if the step is not finite and ``deferred``."""
        if self.found_inf is None:
            return gradients
        return [torch.where(self.found_inf > 0, 0.0, gradient) for gradient in gradients]

    def resolve(self) -> None:
        """Wait for the result of the last check. Raises NonFiniteStep on all ranks."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        step.copied.synchronize()
        loss_finite, gradients_finite, *not_received = step.good.tolist()
        self.stop_signal = STOP_SIGNALS[not_received.index(False)] if False in not_received else None
        scale = self.loss_scale
        self.overflowed = loss_finite and not gradients_finite and scale is not None and scale.can_shrink
        if not ((loss_finite and gradients_finite) or self.overflowed):
            raise NonFiniteStep(self._describe(step), step.iteration)

    def _describe(self, step: "_Pending") -> str:
        users = step.batch.user_ids.tolist()[: min(step.batch.real_batch_size, _SHOWN_USERS)]
        own = (float(step.loss_sum), bool(step.gradients_finite), ", ".join(map(str, users)))
        by_rank = [*enumerate(gather_objects(own, self.mesh.world_group))]
        what, found = "loss", {rank: (loss, rows) for rank, (loss, _, rows) in by_rank if not math.isfinite(loss)}
        if not found:
            what = "gradient"
            found = {rank: ("nan or inf", rows) for rank, (_, is_finite, rows) in by_rank if not is_finite}
        where = "; ".join(
            f"{value} on rank {rank}, whose batch has the users in rows {rows}, … of the data"
            for rank, (value, rows) in found.items()
        )
        scale = ""
        if what == "gradient" and self.loss_scale is not None:
            scale = f" The loss scale is {self.loss_scale.value:g}."
        return (
            f"the {what} is not finite at iteration {step.iteration}: {where or 'the sum over the ranks'}. Nothing was "
            f"updated by this step.{scale} Lower OptimizerArgs.learning_rate, warm up (LRScheduleArgs.warmup_iters), "
            "clip (TrainerArgs.max_grad_norm), or use bfloat16 or float32"
        )


@dataclass(frozen=True)
class _Pending:
    """A checked step whose result the host has not read yet."""

    iteration: int
    good: Tensor
    """bool [4], on the host after ``copied``: loss is finite, gradients are finite, no SIGTERM, no SIGINT."""
    copied: torch.cuda.Event
    loss_sum: Tensor
    gradients_finite: Tensor
    batch: HSTUBatch


class Stopped(Exception):
    """A stop signal has arrived; the message is its name. Raised on all ranks."""


class StopSignal:
    """Ends a run cleanly when any rank receives SIGTERM or SIGINT. A second SIGINT acts as before ``install``."""

    def __init__(self, mesh: Mesh, check: FiniteCheck) -> None:
        self._mesh = mesh
        self._check = check
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals in this process."""
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def uninstall(self) -> None:
        """Restore SIGINT. SIGTERM stays handled: a failed rank still has to report its error to the others."""
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._check.received_signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._mesh.is_main:  # the interrupted code may hold the locks of print and logging
                message = b"\nstopping after this iteration or the next; Ctrl-C again ends the run at once\n"
                os.write(sys.stderr.fileno(), message)

    def raise_if_agreed(self) -> None:
        """Raise Stopped on all ranks once a checked step has carried any rank's signal to all of them."""
        if self._check.stop_signal is not None:
            raise Stopped(self._check.stop_signal.name)

    def raise_if_received(self) -> None:
        """Raise Stopped on all ranks once any rank has received a signal, outside of steps. Collective over gloo."""
        received = int(self._check.received_signal or 0)
        if self._mesh.world_size > 1:
            received = start_max(received, self._mesh.world_group, torch.device("cpu"))()
        if received:
            raise Stopped(signal.Signals(received).name)
