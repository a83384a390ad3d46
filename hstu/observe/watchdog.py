"""Ends the whole run where one rank is dead or stuck, and says which.

Beside the main thread of every rank a thread tells the others where it is. Where the main thread does not move for
the timeout, or an error comes out of it, the ranks' places are compared; the first verdict counts on all ranks. Each
tells it with its own stacks and ends with exit code 1, whatever its main thread waits for.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress

from hstu.config.errors import EXIT_FAILURE
from hstu.observe.verdict import name_the_lost, name_the_stuck
from hstu.parallel.mesh import Mesh
from hstu.parallel.progress import Board, Place

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""How often a rank tells where it is."""
SILENCE_S = 2.0
"""A rank that has told nothing for so long, when something is wrong already, is dead or frozen."""
_SILENCE_ON_SIGTERM_S = 10.0  # here nothing else is wrong, and launchers wait 30 s before they kill
_MAIN_THREAD_S = 1.0
_LAST_RESORT_S = 9.0


class Watchdog:
    """Watches this rank and, through the store, the others. In a world of one nobody waits: it does nothing.

    ``timeout_s``: how long the main thread may stay in one place (``mesh.progress``).
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        self._mesh, self._timeout_s = mesh, timeout_s
        self._board: Board | None = None
        self._first_rank: Place | None = None
        self._sigterm_at: float | None = None
        self._main_thread_ends = threading.Event()
        self._left = False
        self._ending = threading.Lock()
        self._wake_up, self._waker = socket.socketpair()

    def start(self) -> None:
        """Begin to watch; call it in the main thread."""
        mesh = self._mesh
        if mesh.world_size == 1:
            return
        faulthandler.enable()
        mesh.progress.mark()
        assert mesh.store is not None
        self._board = Board(mesh.store, mesh.rank, mesh.world_size, mesh.progress)
        with suppress(RuntimeError):  # the thread will say so, too
            self._board.tell_place()
            # Should rank 0 serve the store and die at once, this is all that is known of it.
            self._first_rank = self._board.await_place_of(0)
        # A signal wakes our thread up even while the main thread, which handles it, is inside a collective.
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(self._board,), name="watchdog", daemon=True)
        self._thread.start()

    def leave(self, error: Exception | None = None) -> None:
        """Stop watching. ``error``: what ends the run on this rank, of which the others do not know."""
        if self._board is None:
            return
        self._main_thread_ends.set()
        with suppress(RuntimeError):  # no one is left to be told
            if error is not None:
                self._board.decide(self._own_failure(error))
                self._linger()
        self._left = True
        signal.set_wakeup_fd(-1)
        self._waker.send(b"\0")
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        with suppress(RuntimeError):
            self._board.tell_place(ended=True)

    def fail(self, error: Exception) -> None:
        """Report an error that came out of the main thread and end this process; returns in a world of one only.

        Collectives fail where another rank has died: then that rank is to blame, and not ``error``.
        """
        if self._board is None:
            return
        self._main_thread_ends.set()
        try:
            verdict = self._decide(self._board, lambda _: self._own_failure(error))
        except RuntimeError as gone:
            verdict = self._store_is_gone(gone)
        self._end(verdict, "".join(traceback.format_exception(error)))

    def _watch(self, board: Board) -> None:
        while not self._left:
            try:
                self._beat(board)
                verdict = None if self._main_thread_ends.is_set() else board.verdict() or self._suspicion(board)
            except RuntimeError as gone:
                verdict = self._store_is_gone(gone)
            if verdict and not self._main_thread_ends.wait(_MAIN_THREAD_S):
                self._end(verdict, _stacks())
            self._sleep()

    def _beat(self, board: Board) -> None:
        # Should our threads not run any more (a library that keeps the interpreter to itself), this one still does.
        if not self._ending.locked():
            faulthandler.dump_traceback_later(self._timeout_s + _LAST_RESORT_S, exit=True)
        board.tell_place()
        self._first_rank = board.place_of(0) or self._first_rank

    def _sleep(self) -> None:
        if select.select([self._wake_up], [], [], BEAT_S)[0] and signal.SIGTERM in self._wake_up.recv(64):
            self._sigterm_at = time.monotonic()

    def _suspicion(self, board: Board) -> str | None:
        """The verdict where something is wrong on this rank."""
        idle_s = self._mesh.progress.idle_s
        if idle_s > self._timeout_s:
            return self._decide(board, name_the_stuck)
        if self._sigterm_at is not None and min(idle_s, time.monotonic() - self._sigterm_at) > SILENCE_S:
            # A launcher stops the ranks that are left when one has died. On a GPU they wait without an error.
            lost = self._lost(board, _SILENCE_ON_SIGTERM_S)
            return board.decide(lost) if lost else None
        return None

    def _decide(self, board: Board, otherwise: Callable[[Iterable[Place]], str]) -> str:
        """The verdict that counts: another rank's if there is one, else who is lost, else what ``otherwise`` says."""
        lost = self._lost(board, SILENCE_S)
        return board.verdict() or board.decide(lost or otherwise(filter(None, board.places().values())))

    def _lost(self, board: Board, silence_s: float) -> str | None:
        before, deadline = board.places(), time.monotonic() + silence_s
        while time.monotonic() < deadline and not board.verdict():
            time.sleep(BEAT_S)
            self._beat(board)
        return name_the_lost(before, board.places())

    def _own_failure(self, error: Exception) -> str:
        assert self._board is not None
        place = self._board.own_place()
        return f"{place} failed {place.at}: {type(error).__name__}: {error}"

    def _store_is_gone(self, error: RuntimeError) -> str:
        served = "the launcher, or rank 0 where it serves the ranks' store, is dead or out of reach"
        last = f"{self._first_rank} was last seen {self._first_rank.at}" if self._first_rank else str(error)
        return f"{served}; {last}"

    def _end(self, verdict: str, stacks: str) -> None:
        """Tell, and end this process."""
        if not self._ending.acquire(blocking=False):  # the other thread does so already
            time.sleep(_LAST_RESORT_S)
        faulthandler.dump_traceback_later(_LAST_RESORT_S, exit=True)  # should telling block
        place = self._board.own_place() if self._board else None
        log.error("%s was here, %s:\n%s", place, place and place.at, stacks)
        log.error("the run ends: %s", verdict)
        self._linger()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILURE)

    def _linger(self) -> None:
        """Rank 0 may serve the store, so it stays until all can have read the verdict."""
        time.sleep(4 * BEAT_S if self._mesh.rank == 0 else BEAT_S)


def _stacks() -> str:
    """Stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
