"""Work on checkpoints beside training: a thread of each rank, and collectives of these threads' own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta

import torch
import torch.distributed as dist

from hstu.parallel.mesh import Mesh
from hstu.parallel.progress import Progress

log = logging.getLogger(__name__)

_POLL_S = 0.5


class Background:
    """Does one piece of work after another, in the same order on all ranks. Made collectively.

    The work gets a mesh of its own: its collectives go over a gloo group of the threads, so that they cannot meet those
    of training, and its marks are not those of the main thread, which the watchdog compares.

    ``timeout_s``: how long these collectives wait for a rank.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._mesh = mesh
        self._own_mesh = dataclasses.replace(mesh, world_group=group, progress=Progress())
        # Else the thread would take up room on the host's first GPU, wherever the copies came from.
        device = (torch.cuda.set_device, (mesh.device,)) if mesh.device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "checkpoint", *device)
        self._work: list[Future[None]] = []

    def start(self, work: Callable[[Mesh], None]) -> None:
        """Let the thread do ``work`` when it has done what it was given before."""
        self._work.append(self._thread.submit(work, self._own_mesh))

    @property
    def is_working(self) -> bool:
        """Whether ``poll`` or ``wait`` have still to tell of work; the same on all ranks."""
        return bool(self._work)

    def poll(self) -> None:
        """Raise the error of work that has ended on all ranks: on all of them in the same step. Collective, if any."""
        if not self._work:
            return
        ended = torch.tensor([int(all(work.done() for work in self._work))])
        if self._mesh.world_size > 1:
            dist.all_reduce(ended, op=dist.ReduceOp.MIN, group=self._mesh.world_group)
        if ended.item():
            self._collect()

    def wait(self) -> None:
        """Return when there is nothing left to do; raise the error, if there was one. All ranks must come here."""
        before = -1
        while wait(self._work, _POLL_S).not_done:
            marks = self._own_mesh.progress.marks
            if marks != before:  # it is getting on, so this rank is not stuck
                self._mesh.progress.alive()
            before = marks
        self._collect()

    def close(self) -> None:
        """As ``wait``, for a run that is failing already: an error is only logged."""
        try:
            self.wait()
        except Exception as error:
            log.error("a checkpoint that was being written is lost: %s", error)

    def _collect(self) -> None:
        work, self._work = self._work, []
        for each in work:
            each.result()
