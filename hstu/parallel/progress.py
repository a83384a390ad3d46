"""How far each rank has come, as the others can see it: marks in this process, places of all ranks on the store."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchrec

_STORE_TIMEOUT = timedelta(seconds=10)
_TORCH, _TORCHREC = Path(torch.__file__).parent, Path(torchrec.__file__).parent
# Where a main thread is that waits for other ranks: in a collective, in a backward (DDP's) or for the device.
_WAITING = tuple(
    str(place)
    for place in (_TORCH / "distributed", _TORCHREC / "distributed", _TORCH / "autograd" / "graph.py", _TORCH / "cuda")
)
_WRITING = str(_TORCH / "distributed" / "checkpoint")


class Progress:
    """What the main thread is at. Marking costs two assignments; another thread may read at any time.

    All ranks run the same program, so all make the same marks: the rank that has made fewer is behind.
    """

    def __init__(self) -> None:
        self.iteration = 0
        """The training step that is being taken, from 1 on; 0 before the first."""
        self.stage = "starting"
        self.marks = 0
        self._at = time.monotonic()

    def mark(self, stage: str | None = None, iteration: int | None = None) -> None:
        """A step forward that all ranks take, into another ``stage`` or ``iteration`` if given."""
        self.stage = self.stage if stage is None else stage
        self.iteration = self.iteration if iteration is None else iteration
        self.marks += 1
        self.alive()

    def alive(self) -> None:
        """A step forward of this rank alone, in work of which some ranks have more than others."""
        self._at = time.monotonic()

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Mark ``stage``, and the former one afterwards; an error leaves the mark where it came up."""
        before = self.stage
        self.mark(stage)
        yield
        self.mark(before)

    @property
    def idle_s(self) -> float:
        """Seconds since the last step forward."""
        return time.monotonic() - self._at


@dataclass(frozen=True)
class Place:
    """Where one rank is, as it tells the others."""

    rank: int
    host: str
    pid: int
    iteration: int
    stage: str
    marks: int
    idle_s: float
    """Seconds that the main thread had not moved when this was told."""
    code: str
    """The line of code that the main thread is at."""
    waiting: bool
    """Whether that line waits for other ranks."""
    told_at: float
    """Wall clock of the rank's host, seconds since the epoch: differs every time a place is told."""
    ended: bool
    """Whether the rank has left the run in good order."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def at(self) -> str:
        """Iteration and stage in words."""
        return f"at iteration {self.iteration} ({self.stage})"


class Board:
    """What the ranks tell one another beside their collectives, over a connection of its own to the launch's store.

    Under torchrun its agent serves the store, which outlives every rank; else rank 0 does. Every method raises
    RuntimeError once the store is gone.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, progress: Progress) -> None:
        connection: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
        connection.set_timeout(_STORE_TIMEOUT)
        self._store = dist.PrefixStore("board", connection)
        self._rank, self._world_size, self._progress = rank, world_size, progress

    def own_place(self, ended: bool = False) -> Place:
        """Where this rank is now."""
        code, waiting = _line_of_main_thread()
        return Place(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            iteration=self._progress.iteration,
            stage=self._progress.stage,
            marks=self._progress.marks,
            idle_s=self._progress.idle_s,
            code=code,
            waiting=waiting,
            told_at=time.time(),
            ended=ended,
        )

    def tell_place(self, ended: bool = False) -> None:
        """Let the others know where this rank is."""
        self._store.set(f"place {self._rank}", json.dumps(dataclasses.asdict(self.own_place(ended))))

    def place_of(self, rank: int) -> Place | None:
        """What ``rank`` has told last, if anything."""
        if not self._store.check([f"place {rank}"]):
            return None
        return self.await_place_of(rank)

    def await_place_of(self, rank: int) -> Place:
        """The same; waits a while for a rank that has told nothing yet."""
        told: dict[str, Any] = json.loads(self._store.get(f"place {rank}"))
        return Place(**told)

    def places(self) -> dict[int, Place | None]:
        """What each rank has told last."""
        return {rank: self.place_of(rank) for rank in range(self._world_size)}

    def decide(self, verdict: str) -> str:
        """Say why the run ends. The first to say so is right; returns what it has said."""
        first: bytes = self._store.compare_set("verdict", "", verdict)
        return first.decode()

    def verdict(self) -> str | None:
        """Why the run ends, if it does."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None


def _line_of_main_thread() -> tuple[str, bool]:
    """(innermost line of Python, whether it waits for other ranks)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "unknown", False
    code = frame.f_code
    waiting = code.co_filename.startswith(_WAITING) and not code.co_filename.startswith(_WRITING)
    return f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}", waiting
