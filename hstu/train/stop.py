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

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A stop signal has arrived; the text is its name. Raised on all ranks alike, between two steps or two batches of
    an evaluation."""


class StopSignal:
    """Ends a run cleanly, with exit code 0, when any rank receives SIGTERM or SIGINT. A second SIGINT acts as it did
    before ``install``."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals in this process."""
        self._before = {number: signal.signal(number, self._receive) for number in _STOP_SIGNALS}

    def uninstall(self) -> None:
        """Handle SIGINT as before. SIGTERM stays handled: a rank that failed still has to report it to the others."""
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._mesh.is_main:  # print and logging may be in use by the code that the signal interrupts
                os.write(sys.stderr.fileno(), b"\nstopping after this iteration; Ctrl-C again ends the run at once\n")

    def raise_if_received(self) -> None:
        """Raise Stopped on all ranks once any rank has received a signal. Collective on host memory."""
        received = self._received
        if self._mesh.world_size > 1:
            flag = torch.tensor([received])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._mesh.world_group)
            received = int(flag.item())
        if received:
            raise Stopped(signal.Signals(received).name)
