"""The check that no loss or gradient of a step is nan or infinite, which also carries the signals that stop a run.

The loss scale of float16 follows what the check finds.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hstu.base.errors import UserError
from hstu.config.args import PrecisionArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""A scheduler sends SIGTERM, and Ctrl-C SIGINT."""
_SHOWN_USERS = 5
INITIAL_SCALE = 65536.0
SCALE_FACTOR = 2.0
LOWEST_SCALE = 1.0
HIGHEST_SCALE = 2.0**127
"""The largest power of two in float32."""


class NonFiniteStep(UserError):
    """A loss or gradient is not finite. Raised on all ranks alike."""

    def __init__(self, message: str, iteration: int) -> None:
        super().__init__(message)
        self.iteration = iteration
        """The iteration of the step, counted from 1."""


class LossScale:
    """The factor by which a float16 run multiplies its loss, so that small gradients do not vanish.

    Has the arithmetic of torch.amp.GradScaler, with the scale and its counters on the host.

    GradScaler detects an overflow when an optimizer steps, on each rank by itself. Sharded tables are updated earlier,
    inside backward, and all ranks must decide alike. The host therefore decides, by the step's finite check.
    """

    def __init__(self, args: PrecisionArgs) -> None:
        self.is_dynamic = args.loss_scale in (None, "dynamic")
        self.value = INITIAL_SCALE if self.is_dynamic else float(args.loss_scale or 0)
        self._growth_interval = args.growth_interval
        self._steps_without_overflow = 0
        self._skipped_steps = 0

    @property
    def can_shrink(self) -> bool:
        """Whether a step whose gradients overflow may be skipped, because training can go on with a lower scale."""
        return self.is_dynamic and self.value > LOWEST_SCALE

    def update(self, found_inf: bool) -> None:
        """Follow one step. ``found_inf``: its gradients overflowed and it was skipped, which needs ``can_shrink``."""
        if found_inf:
            self.value = max(self.value / SCALE_FACTOR, LOWEST_SCALE)
            self._steps_without_overflow = 0
            self._skipped_steps += 1
            return
        self._steps_without_overflow += 1
        if self.is_dynamic and self._steps_without_overflow >= self._growth_interval:
            self.value = min(self.value * SCALE_FACTOR, HIGHEST_SCALE)
            self._steps_without_overflow = 0

    def pop_skipped_steps(self) -> int:
        """Number of steps skipped since the last call."""
        skipped, self._skipped_steps = self._skipped_steps, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as JSON."""
        return {
            "value": self.value,
            "steps_without_overflow": self._steps_without_overflow,
            "skipped": self._skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``. A scale that the configuration fixes keeps its value."""
        if self.is_dynamic:
            self.value = state["value"]
        self._steps_without_overflow = state["steps_without_overflow"]
        self._skipped_steps = state["skipped"]


class FiniteCheck:
    """Checks each step between the backward of the dense part and that of the tables; the run ends at a bad step.

    On a CPU the check raises at once. On a GPU the host runs ahead of the device and does not wait: ``found_inf`` and
    ``mask`` make the bad step leave every weight and state as it was, and the host raises when it checks the step
    after it, or in ``resolve``. Zero gradients do move the moments of FBGEMM's fused Adam on a GPU, but the run ends
    before these are used: nothing may be evaluated, logged or saved before ``resolve``.

    The same collective carries stop signals, so that the ranks agree on them without one of their own.

    A dynamic loss scale skips a step whose gradients overflow and goes on, so there the host waits for every check.
    """

    def __init__(self, mesh: Mesh, loss_scale: LossScale | None = None) -> None:
        self.mesh = mesh
        self.loss_scale = loss_scale
        self.deferred = mesh.device.type == "cuda" and not (loss_scale is not None and loss_scale.is_dynamic)
        """Whether the host learns the result of a check one step later."""
        self.found_inf: Tensor | None = None
        """Deferred: float32 scalar on the device, 1 if the last checked step is not finite, else 0."""
        self.overflowed = False
        """Whether the last resolved step is to be skipped, because its gradients overflow a dynamic loss scale."""
        self.received_signal: signal.Signals | None = None
        """One of STOP_SIGNALS that this rank has received. Its handler sets it."""
        self.stop_signal: signal.Signals | None = None
        """A signal that some rank had received by the last resolved step. Equal on all ranks."""
        self._pending: _Pending | None = None

    def __call__(self, loss_sum: Tensor, gradients_finite: Tensor, batch: HSTUBatch) -> Tensor:
        """Check one step and return ``loss_sum`` summed over the data-parallel ranks. Collective.

        loss_sum: float32 scalar of this rank. gradients_finite: bool scalar of this rank, before any average.
        Raises NonFiniteStep for this step, or if ``deferred`` for the one before.
        """
        self.resolve()
        received = loss_sum.new_zeros(len(STOP_SIGNALS))
        if self.received_signal is not None:
            received[STOP_SIGNALS.index(self.received_signal)] = 1.0
        totals = torch.cat([torch.stack([loss_sum, (~gradients_finite).float()]), received])
        if self.mesh.dp_size > 1:
            dist.all_reduce(totals, group=self.mesh.dp_group)
        bad = torch.cat([(~totals[:1].isfinite()).float(), totals[1:]])
        if self.mesh.tp_cp_size > 1:  # each rank of a group computes the same loss
            dist.all_reduce(bad, group=self.mesh.tp_cp_group)
        good = bad == 0
        self.found_inf = (~good[:2].all()).float() if self.deferred else None
        self._pending = _Pending(
            self.mesh.heartbeat.iteration, *self._copy_to_host(good), loss_sum, gradients_finite, batch
        )
        if not self.deferred:
            self.resolve()
        return totals[0]

    def _copy_to_host(self, good: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy that has begun, and the event of its end."""
        on_host = good.to("cpu", non_blocking=True)  # pinned, if it comes from a GPU
        copied = torch.get_device_module(good.device).Event()
        copied.record()
        return on_host, copied

    def mask(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients for the tables: zeros if the step is not finite and the host does not know it yet."""
        if self.found_inf is None:
            return gradients
        return [torch.where(self.found_inf > 0, 0.0, gradient) for gradient in gradients]

    def resolve(self) -> None:
        """Wait for the result of the last check. Raises NonFiniteStep on all ranks alike."""
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

    def _describe(self, step: _Pending) -> str:
        users = step.batch.user_ids.tolist()[: step.batch.real_batch_size]
        own = (float(step.loss_sum), bool(step.gradients_finite), users)
        by_rank = gather_objects(own, self.mesh.world_group)
        places = [_rank_and_users(rank, users) for rank, (_, _, users) in enumerate(by_rank)]
        ranks = list(zip(by_rank, places, strict=True))
        losses = [f"{loss} {place}" for (loss, _, _), place in ranks if not math.isfinite(loss)]
        gradients = [f"nan or inf {place}" for (_, finite, _), place in ranks if not finite]
        what, where = ("gradient", gradients) if gradients and not losses else ("loss", losses)
        advice = "" if self.loss_scale is None or losses else _advice(self.loss_scale)
        return (
            f"the {what} is not finite at iteration {step.iteration}: "
            f"{'; '.join(where) or 'the sum over the ranks, on none of them'}. Nothing was updated by this step. Lower "
            "OptimizerArgs.learning_rate, warm up (LRScheduleArgs.warmup_iters), clip (TrainerArgs.max_grad_norm) or "
            f"use float32{advice}"
        )


@dataclass(frozen=True)
class _Pending:
    """A checked step whose result the host has not read."""

    iteration: int
    good: Tensor
    """bool [4], on the host once ``copied``: on all ranks the loss is finite, the gradients are finite, and neither of
    STOP_SIGNALS has been received."""
    copied: torch.cuda.Event
    loss_sum: Tensor
    gradients_finite: Tensor
    batch: HSTUBatch


def _advice(loss_scale: LossScale) -> str:
    if loss_scale.is_dynamic:
        return f". The loss scale is at its lowest, {loss_scale.value:g}: bfloat16 holds numbers that float16 does not"
    return f'. PrecisionArgs.loss_scale = {loss_scale.value:g} is fixed: lower it, or leave it to "dynamic"'


def _rank_and_users(rank: int, users: Sequence[int]) -> str:
    shown = ", ".join(map(str, users[:_SHOWN_USERS]))
    more = ", …" if len(users) > _SHOWN_USERS else ""
    return f"on rank {rank}, whose batch has the users in rows {shown}{more} of the data"


class Stopped(Exception):
    """A stop signal has arrived; the text is its name. Raised on all ranks alike, between two steps or two batches of
    an evaluation."""


class StopSignal:
    """Ends a run cleanly, with exit code 0, when any rank receives SIGTERM or SIGINT. A second SIGINT acts as it did
    before ``install``."""

    def __init__(self, mesh: Mesh, check: FiniteCheck) -> None:
        self._mesh = mesh
        self._check = check
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals in this process."""
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def uninstall(self) -> None:
        """Handle SIGINT as before. SIGTERM stays handled: a rank that failed still has to report it to the others."""
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._check.received_signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._mesh.is_main:  # print and logging may be in use by the code that the signal interrupts
                message = b"\nstopping after this iteration or the next; Ctrl-C again ends the run at once\n"
                os.write(sys.stderr.fileno(), message)

    def raise_if_agreed(self) -> None:
        """Raise Stopped on all ranks once a checked step has carried the signal of any rank to all of them."""
        if self._check.stop_signal is not None:
            raise Stopped(self._check.stop_signal.name)

    def raise_if_received(self) -> None:
        """Raise Stopped on all ranks once any rank has received a signal: outside of steps. Collective over gloo."""
        received = int(self._check.received_signal or 0)
        if self._mesh.world_size > 1:
            flag = torch.tensor([received])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._mesh.world_group)
            received = int(flag.item())
        if received:
            raise Stopped(signal.Signals(received).name)
