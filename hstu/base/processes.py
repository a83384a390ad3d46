"""Child processes that end together with their parent."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1


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
