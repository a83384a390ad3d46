"""Start the runs of a table, several at a time, and show how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu.base.errors import UserError
from hstu.base.processes import end_with_parent
from scripts.quality.runs import ROOT, Run

_POLL_S = 0.1
_SHOW_S = 30.0
_STOP_S = 60.0
"""A run that was told to stop writes its checkpoint within this time, or is killed."""
_LAST_LINES = 8


@dataclass
class Active:
    """A run of which a command is running."""

    run: Run
    commands: Iterator[list[str]]
    began: float
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.run.folder / "output.txt"

    def start_next(self) -> bool:
        """Start the next command. Returns whether there was one. Raises UserError if the last has not done its work."""
        command = next(self.commands, None)
        if command is None:
            return False
        environment = os.environ | {"OMP_NUM_THREADS": str(self.run.threads)}
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this program alone, which then stops the runs in order.
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        return True


def execute(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Do what is not done of ``runs``, ``jobs`` at a time. Returns those that have failed.

    Raises KeyboardInterrupt after the runs have saved their checkpoints.
    """
    waiting = [run for run in runs if run.stored() is None]
    done, failed, active = len(runs) - len(waiting), list[Run](), list[Active]()
    for run in waiting:
        if run.is_outdated():
            print(f"{run}: its settings or its data have changed since it was run; it is run again", flush=True)
    clock = Progress(len(runs), len(waiting))
    try:
        while waiting or active:
            while len(active) < jobs and (ready := next((run for run in waiting if can_start(run)), None)):
                waiting.remove(ready)
                print(f"{ready}: started in {ready.folder}", flush=True)
                active.append(Active(ready, ready.commands(), time.monotonic()))
                done, failed = _advance(active[-1], active, done, failed)
            if not active and waiting:
                for run in waiting:
                    print(f"{run}: not run, because {run.row.epochs_of!r} has not finished with all seeds", flush=True)
                return [*failed, *waiting]
            time.sleep(_POLL_S)
            for each in list(active):
                if each.process is not None and each.process.poll() is not None:
                    before = done
                    done, failed = _advance(each, active, done, failed)
                    if done > before:
                        clock.show(done, active, at_once=True)
            clock.show(done, active)
    except KeyboardInterrupt:
        stop([each.process for each in active if each.process is not None])
        raise
    return failed


def can_start(run: Run) -> bool:
    """Whether the runs that ``run`` needs are finished."""
    if run.row.epochs_of is None:
        return True
    vars(run).pop("settings", None)  # they were unknown as long as the others were not finished
    return run.settings is not None


def _advance(each: Active, active: list[Active], done: int, failed: list[Run]) -> tuple[int, list[Run]]:
    """Start the next command of a run, or finish it. Returns the runs that are done and those that have failed."""
    try:
        code = each.process.poll() if each.process is not None else 0
        if code:
            raise UserError(f"a command ended with exit code {code}")
        if each.start_next():
            return done, failed
        print(f"{each.run}: {describe(each.run)}, {time.monotonic() - each.began:.0f} s", flush=True)
        active.remove(each)
        return done + 1, failed
    except UserError as error:
        lines = each.log.read_text(encoding="utf-8", errors="replace").splitlines() if each.log.exists() else []
        print(f"{each.run}: failed: {error}. The end of {each.log}:", flush=True)
        print("".join(f"    {line}\n" for line in lines[-_LAST_LINES:]), end="", flush=True)
        active.remove(each)
        return done, [*failed, each.run]


def describe(run: Run) -> str:
    """The result of a run on one line."""
    result = run.stored()
    assert result is not None
    shown = " ".join(f"{name}={result.metrics[name]:.4f}" for name in run.table.metrics if name in result.metrics)
    return f"held out: {shown}"


class Progress:
    """A line every half minute and after each run: what is done, what is running, when all will be."""

    def __init__(self, total: int, to_do: int) -> None:
        self._total, self._to_do = total, to_do
        self._began = self._shown = time.monotonic()

    def show(self, done: int, active: Sequence[Active], at_once: bool = False) -> None:
        """Print the line if it is time."""
        now = time.monotonic()
        if not at_once and now - self._shown < _SHOW_S:
            return
        self._shown = now
        shares = [each.run.progress() for each in active]
        finished = done - (self._total - self._to_do) + sum(shares)
        left = (self._to_do - finished) * (now - self._began) / finished if finished > 0.01 else None
        running = "; ".join(f"{each.run} {share:.0%}" for each, share in zip(active, shares, strict=True))
        eta = "unknown" if left is None else duration(left)
        print(f"{done} of {self._total} runs done, ETA {eta}{'; running: ' * bool(running)}{running}", flush=True)


def duration(seconds: float) -> str:
    """``seconds`` as people say it."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes; trainings save a checkpoint first. A second Ctrl-C kills them at once."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    try:
        for process in processes:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
