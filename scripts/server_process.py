"""Starts a server in a process of its own, for scripts that measure or try it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

_SERVE = Path(__file__).with_name("serve.py")
_START_S = 180.0


def start_server(export: Path, log: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start scripts/serve.py, and wait until it listens.

    Args:
        export: what to serve.
        log: file for its output.
        options: further options.

    Returns (the process, its port on this machine). Raises SystemExit with the log if it ends, or after three minutes.
    """
    with log.open("wb") as file:
        command = [sys.executable, str(_SERVE), "--export", str(export), "--port", "0", *options]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"listening url=http://[^ ]+:(\d+)", log.read_text()):
            return process, int(found[1])
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"the server does not start:\n{log.read_text()}")
