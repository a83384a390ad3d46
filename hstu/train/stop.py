"""Stopping cleanly: SIGTERM (a scheduler's warning) ends the run after the step in flight, with exit code 0."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from hstu.parallel.mesh import Mesh


class Stopped(Exception):
    """Raised on all ranks alike, between two steps or two batches of an evaluation."""


class StopSignal:
    """Remembers a SIGTERM until the training loop asks for it."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._received = False

    def install(self) -> None:
        """Take over SIGTERM in this process."""
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, _signum: int, _frame: FrameType | None) -> None:
        self._received = True

    def raise_if_received(self) -> None:
        """Raises Stopped on all ranks once any rank has received the signal; a collective on host memory."""
        if self._agreed():
            raise Stopped

    def _agreed(self) -> bool:
        if self._mesh.world_size == 1:
            return self._received
        flag = torch.tensor([int(self._received)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._mesh.world_group)
        return bool(flag.item())
