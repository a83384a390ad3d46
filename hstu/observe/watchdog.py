"""Ends the whole run when a rank is dead or stuck, and names that rank.

A thread on every rank publishes the rank's status. When the main thread stalls for the timeout or raises an error, the
thread compares the statuses of all ranks and proposes a verdict. The first verdict holds for all ranks: each logs it
with its own stacks and exits with code 1, even if its main thread hangs.
"""

import dataclasses
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchrec

from hstu.base.errors import EXIT_FAILURE
from hstu.parallel.mesh import Mesh, without_timeout

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""Seconds between two status reports of a rank."""
SILENCE_S = 2.0
"""Once something is wrong, a rank without a report for this many seconds counts as dead or frozen."""
_SILENCE_ON_SIGTERM_S = 10.0  # nothing else is wrong then, and launchers wait 30 s before they kill
_MAIN_THREAD_S = 1.0
_LAST_RESORT_S = 9.0
_STORE_TIMEOUT = timedelta(seconds=10)
_STORE_IS_GONE = "the launcher, or rank 0 where it serves the ranks' store, is dead or out of reach: {}"
_TORCH, _TORCHREC = Path(torch.__file__).parent, Path(torchrec.__file__).parent
# A main thread inside this code waits for other ranks (in a collective or in DDP's backward) or for the device.
_WAITING = tuple(
    str(path)
    for path in (_TORCH / "distributed", _TORCHREC / "distributed", _TORCH / "autograd" / "graph.py", _TORCH / "cuda")
)
_WRITING = str(_TORCH / "distributed" / "checkpoint")


@dataclass(frozen=True)
class RankStatus:
    """Progress of one rank, as published to the other ranks."""

    rank: int
    host: str
    pid: int
    iteration: int
    stage: str
    marks: int
    idle_s: float
    """Seconds since the last heartbeat of the main thread, at the time of the report."""
    code: str
    """The line of code that the main thread executes."""
    waiting: bool
    """Whether that line waits for other ranks."""
    reported_at: float
    """Seconds since the epoch on the clock of the rank's host; different in every report."""
    ended: bool
    """Whether the rank has left the run without an error."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def at(self) -> str:
        """Iteration and stage in words."""
        return f"at iteration {self.iteration} ({self.stage})"


Statuses = Mapping[int, RankStatus | None]
"""Rank → its last status; None before the first."""


class Watchdog:
    """Watches this rank and the others. With a single rank it does nothing.

    Statuses and verdict are in the launcher's store, over a separate connection. torchrun's agent serves the store and
    outlives every rank; without torchrun, rank 0 serves it. Store calls raise RuntimeError once it is gone.
    ``timeout_s``: seconds that the main thread may spend without a heartbeat (``mesh.heartbeat``).
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        self._mesh, self._timeout_s = mesh, timeout_s
        self._thread: threading.Thread | None = None
        self._sigterm_at: float | None = None
        self._main_thread_ends = threading.Event()
        self._left = False
        self._ending = threading.Lock()
        self._wake_up, self._waker = socket.socketpair()

    def start(self) -> None:
        """Start watching. Call it in the main thread."""
        mesh = self._mesh
        if mesh.world_size == 1:
            return
        faulthandler.enable()
        without_timeout(mesh)  # the watchdog replaces the timeout
        mesh.heartbeat.mark()
        assert mesh.store is not None
        connection: dist.Store = mesh.store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
        connection.set_timeout(_STORE_TIMEOUT)
        self._store = dist.PrefixStore("board", connection)
        # Wakes the watchdog thread on a signal even while the main thread, which handles it, is inside a collective.
        self._waker.setblocking(False)
        self._wake_up.settimeout(BEAT_S)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def leave(self, error: Exception | None = None) -> None:
        """Stop watching. ``error``: an error of this rank alone, which is reported to the other ranks."""
        if self._thread is None:
            return
        self._main_thread_ends.set()
        with suppress(RuntimeError):  # the store is gone, so no rank is left to inform
            if error is not None:
                self._propose(self._failure(error))
                self._linger()
        self._left = True
        signal.set_wakeup_fd(-1)
        self._waker.send(b"\0")
        self._thread.join()
        with suppress(RuntimeError):
            self._report(ended=True)

    def fail(self, error: Exception) -> None:
        """End this process with ``error``, or the death of another rank that caused it. A single rank returns."""
        if self._thread is None:
            return
        self._main_thread_ends.set()
        try:
            own = self._failure(error)
            verdict = self._decide(lambda _: own) or own
        except RuntimeError as gone:
            verdict = _STORE_IS_GONE.format(gone)
        self._end(verdict, "".join(traceback.format_exception(error)))

    def _watch(self) -> None:
        while not self._left:
            try:
                self._report()
                verdict = None if self._main_thread_ends.is_set() else self._verdict() or self._suspicion()
            except RuntimeError as gone:
                verdict = _STORE_IS_GONE.format(gone)
            if verdict and not self._main_thread_ends.wait(_MAIN_THREAD_S):
                with tempfile.TemporaryFile("w+") as file:
                    faulthandler.dump_traceback(file)
                    file.seek(0)
                    self._end(verdict, file.read())
            with suppress(TimeoutError):
                if signal.SIGTERM in self._wake_up.recv(64):
                    self._sigterm_at = time.monotonic()

    def _suspicion(self) -> str | None:
        """The verdict if something is wrong on this rank, else None."""
        idle_s = self._mesh.heartbeat.idle_s
        if idle_s > self._timeout_s:
            return self._decide(name_the_stuck)
        if self._sigterm_at is not None and min(idle_s, time.monotonic() - self._sigterm_at) > SILENCE_S:
            # A launcher sends SIGTERM to the other ranks when one has died. On a GPU they wait without an error.
            return self._decide(lambda _: None, _SILENCE_ON_SIGTERM_S, may_leave=True)
        return None

    def _decide(
        self,
        otherwise: Callable[[Iterable[RankStatus]], str | None],
        silence_s: float = SILENCE_S,
        may_leave: bool = False,
    ) -> str | None:
        """The verdict of another rank if there is one, else the lost ranks, else ``otherwise(statuses)``.

        One rank reads the statuses of all, and the others wait for its verdict: if all suspected and read, the store
        would serve the square of their number. A reader that gives no verdict in time is replaced.
        """
        own, reader = f"rank {self._mesh.rank} at {time.time()}", ""
        while (reader := self._store.compare_set("reader", reader, own).decode()) != own:
            if (verdict := self._wait(silence_s + SILENCE_S)) or self._left:
                return verdict
        earlier = self._statuses()
        if (verdict := self._wait(silence_s)) or self._left:
            return verdict
        last = {rank: last for rank, last in self._statuses().items() if not (may_leave and last and last.ended)}
        verdict = name_the_lost(earlier, last) or otherwise(filter(None, last.values()))
        if verdict is None:
            self._store.compare_set("reader", own, "")
            return None
        return self._propose(verdict)

    def _wait(self, seconds: float) -> str | None:
        """Wait for the verdict of another rank. None: there is none, or this rank leaves."""
        deadline = time.monotonic() + seconds
        while not (verdict := self._verdict()) and not self._left and time.monotonic() < deadline:
            time.sleep(BEAT_S)
            self._report()
        return verdict

    def _end(self, verdict: str, stacks: str) -> None:
        if not self._ending.acquire(blocking=False):  # the other thread is already ending the process
            time.sleep(_LAST_RESORT_S)
        faulthandler.dump_traceback_later(_LAST_RESORT_S, exit=True)  # in case logging blocks
        status = self._status()
        log.error("%s was %s:\n%s", status, status.at, stacks)
        log.error("the run ends: %s", verdict)
        self._linger()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILURE)

    def _linger(self) -> None:
        """Wait until every rank can have read the verdict. Rank 0 may serve the store, so it waits longest."""
        time.sleep(4 * BEAT_S if self._mesh.rank == 0 else BEAT_S)

    def _status(self, ended: bool = False) -> RankStatus:
        heartbeat, (code, waiting) = self._mesh.heartbeat, _line_of_main_thread()
        return RankStatus(
            rank=self._mesh.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            iteration=heartbeat.iteration,
            stage=heartbeat.stage,
            marks=heartbeat.marks,
            idle_s=heartbeat.idle_s,
            code=code,
            waiting=waiting,
            reported_at=time.time(),
            ended=ended,
        )

    def _failure(self, error: Exception) -> str:
        status = self._status()
        return f"{status} failed {status.at}: {type(error).__name__}: {error}"

    def _report(self, ended: bool = False) -> None:
        self._store.set(f"status {self._mesh.rank}", json.dumps(dataclasses.asdict(self._status(ended))))

    def _statuses(self) -> Statuses:
        keys = {f"status {rank}": rank for rank in range(self._mesh.world_size)}
        found = [*keys] if self._store.check([*keys]) else [key for key in keys if self._store.check([key])]
        texts = dict(zip(found, self._store.multi_get(found), strict=True))
        return {rank: RankStatus(**json.loads(texts[key])) if key in texts else None for key, rank in keys.items()}

    def _propose(self, verdict: str) -> str:
        """Propose a verdict. Returns the first proposal of any rank, which holds."""
        first: bytes = self._store.compare_set("verdict", "", verdict)
        return first.decode()

    def _verdict(self) -> str | None:
        """The verdict; None while the run continues."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None


def _line_of_main_thread() -> tuple[str, bool]:
    """(innermost line of Python, whether it waits for other ranks)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "unknown", False
    code = frame.f_code
    waiting = code.co_filename.startswith(_WAITING) and not code.co_filename.startswith(_WRITING)
    return f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}", waiting


def name_the_lost(before: Statuses, after: Statuses) -> str | None:
    """Name ranks that are dead, frozen or gone, else None. A living rank's reports in both arguments differ."""
    lost, alive = [], []
    for rank, status in after.items():
        if status is None:
            lost.append(f"rank {rank} never started")
        elif status.ended:
            lost.append(f"{status} has left {status.at}")
        elif status == before[rank]:
            seconds = max(0.0, time.time() - status.reported_at)
            lost.append(f"{status} is dead or frozen: last seen {seconds:.0f} s ago {status.at}")
        else:
            alive.append(status)
    return "; ".join([*lost, f"alive: {_group(alive)}"]) if lost else None


def name_the_stuck(statuses: Iterable[RankStatus]) -> str:
    """Name the ranks that others wait for: they have the fewest marks or, if all are equal, wait for no other rank."""
    statuses = list(statuses)
    fewest = min(status.marks for status in statuses)
    stuck = [status for status in statuses if status.marks == fewest]
    if len(stuck) == len(statuses):
        stuck = [status for status in statuses if not status.waiting]
    others = [status for status in statuses if status not in stuck]
    if not stuck or not others:
        return f"no rank makes progress, and none is behind the others: {_group(statuses)}"
    named = "; ".join(f"{status} is stuck {status.at} for {status.idle_s:.0f} s in {status.code}" for status in stuck)
    return f"{named}; {_group(others)} wait{'s' if len(others) == 1 else ''} for {'it' if len(stuck) == 1 else 'them'}"


def _group(statuses: Iterable[RankStatus]) -> str:
    """Group ranks by iteration and stage: ``ranks 0, 1, 2 at iteration 5 (training step), rank 3 at …``."""
    by_status: dict[str, list[str]] = {}
    for status in statuses:
        by_status.setdefault(status.at, []).append(str(status.rank))
    return ", ".join(f"rank{'s'[: len(ranks) - 1]} {', '.join(ranks)} {at}" for at, ranks in by_status.items())
