"""Child processes that end together with their parent."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1
_STOP_S = 60.0
"""A training that is told to stop writes its checkpoint within this time, or is killed."""


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_python(words: Sequence[str], output: BinaryIO, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python program that writes to ``output`` and ends with this process. ``options``: further ones of Popen.

    It has a session of its own, so that Ctrl-C reaches this process alone, which then stops the program in order.
    """
    return subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        preexec_fn=end_with_parent, **options,
    )  # fmt: skip


def stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End programs of ``start_python``. Trainings save a checkpoint first; a second Ctrl-C kills them at once."""
    deadline = time.monotonic() + _STOP_S
    for child in children:
        child.terminate()
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for child in children:
            child.wait(timeout=max(0.1, deadline - time.monotonic()))
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def last_lines(output: Path, count: int = 12) -> str:
    """The end of the output of a program, indented; empty if there is no such file."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
    return "\n".join(f"    {line}" for line in lines[-count:])
