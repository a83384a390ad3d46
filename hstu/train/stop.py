"""Signals that stop a run: SIGTERM of a scheduler, SIGINT of Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import STOP_SIGNALS, FiniteCheck


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
