"""Checks the kernels of a GPU backend in a process of their own, so that no fault in them can end or stop a run.

An illegal access makes CUDA unusable for its process, a fault in a compiler or driver may kill the process, and a wrong
kernel may never end. Each of these means: the backend is refused, and the message says why.

The result is remembered on disk for these kernels, versions, GPU, driver and shapes. The processes of a host check one
after the other, so that the first one checks for all.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hstu.ops.kernels import KernelShapes
from hstu.ops.self_check import cache_directory, locked

log = logging.getLogger(__name__)

TIME_LIMIT_S = 240.0
"""Longest time for one case, whose kernels are compiled first, and for the imports before the first case."""
POLL_S = 0.5
KILL_S = 10.0
"""Wait for a killed process, which may be stuck in the driver."""
FAILURE_S = 3600.0
"""Time after which a failed check is repeated: another process may have filled the memory of the GPU."""
ROOT = Path(__file__).parents[2]
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Checked:
    """Kernels to check."""

    name: str
    """Of the backend, for messages."""
    package: str
    """Distribution that compiles the kernels."""
    module: str
    """Module with ``checks(device, shapes)``: see :data:`hstu.ops.self_check.Checks`. Only the process imports it."""
    sources: Path
    """Folder of the kernels."""


def refusal(kernels: Checked, device: torch.device, shapes: KernelShapes | None) -> str | None:
    """Why these kernels cannot be used on a GPU; None: they agree with PyTorch.

    Args:
        kernels: The backend.
        device: The GPU.
        shapes: The shapes of the run; None: only what does not depend on them.
    """
    try:
        version = importlib.metadata.version(kernels.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{kernels.package} is not installed"
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / f"{kernels.name.lower()}_kernels_{_key(kernels, version, device, shapes)}.json"
        with locked(record.with_suffix(".lock")):
            known = _remembered(record)
            if known is None:
                known = {"refusal": _check(kernels, device, shapes)}
                _remember(record, known)
    except OSError as error:
        log.info("the check of the %s kernels cannot be remembered (%s)", kernels.name, error)
        return _check(kernels, device, shapes)
    reason: str | None = known["refusal"]
    return reason


def _key(kernels: Checked, version: str, device: torch.device, shapes: KernelShapes | None) -> str:
    """A hash of everything that decides the machine code and what runs it."""
    digest = hashlib.sha256()
    for source in sorted(kernels.sources.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    driver = DRIVER.read_text() if DRIVER.exists() else ""
    digest.update(repr((kernels.module, version, torch.__version__, torch.version.cuda, gpu, driver, shapes)).encode())
    return digest.hexdigest()[:16]


def _remembered(record: Path) -> Mapping[str, Any] | None:
    """The result of an earlier check; None if there is none, it is unreadable, or a failure that is too old."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["refusal"] is None or time.time() - record.stat().st_mtime < FAILURE_S:
            return dict(known)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    return None


def _remember(record: Path, result: Mapping[str, Any]) -> None:
    written = record.with_suffix(".new")
    written.write_text(json.dumps(result), encoding="utf-8")
    os.replace(written, record)


def _check(kernels: Checked, device: torch.device, shapes: KernelShapes | None) -> str | None:
    """The result of a process that checks the kernels now."""
    log.info("checking the %s kernels on this GPU (once per machine and shape)", kernels.name)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "report", Path(folder) / "output"
        report.touch()
        command = [sys.executable, "-m", "hstu.ops.check_process", kernels.module, str(device), _to_json(shapes)]
        try:
            code = _exit_code([*command, str(report)], report, output)
        except OSError as error:
            return f"its self check cannot be started: {error}"
        records = list(_records(report.read_text(encoding="utf-8", errors="replace")))
        reason = _reason(kernels.name, code, records, output.read_text(encoding="utf-8", errors="replace"))
    if reason is None:
        worst = max((error / limit for error, limit in _errors(records).values() if limit), default=0.0)
        seconds = time.monotonic() - begun
        log.info(
            "%s kernels agree with PyTorch to %.0f %% of the tolerance (%.0f s)", kernels.name, 100 * worst, seconds
        )
    return reason


def _exit_code(command: list[str], report: Path, output: Path) -> int | None:
    """Run a command; returns its exit code, None where it had to be killed because ``report`` did not grow.

    What the command prints goes to ``output``.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        while time.time() - report.stat().st_mtime < TIME_LIMIT_S:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
        return None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_S)


def _reason(name: str, code: int | None, records: list[Mapping[str, Any]], output: str) -> str | None:
    """Why the check refuses the kernels; None: all of them agree with PyTorch."""
    for operator, (error, tolerance) in _errors(records).items():
        if not error <= tolerance:
            return (
                f"the {name} kernel of {operator} differs from PyTorch by {error:.2g}, more than {tolerance} (relative "
                f"error); please report this with the versions of {name} and of the driver"
            )
    if records and "done" in records[-1]:
        return None
    current = next((record["case"] for record in reversed(records) if "case" in record), "its start")
    last_line = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    if code is None:
        what = f"did not go on for {TIME_LIMIT_S:.0f} s"
    elif records and "error" in records[-1]:
        what = f"raised {records[-1]['error']}"
    elif code < 0:
        what = f"was killed by {signal.Signals(-code).name}"
    else:
        what = f"ended with exit code {code} ({last_line})"
    return f"the self check of the {name} kernels {what}, in {current}"


def _records(text: str) -> Iterator[Mapping[str, Any]]:
    for line in text.splitlines():
        with suppress(ValueError):  # the process was killed while it wrote
            yield json.loads(line)


def _errors(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    return {name: (error, limit) for each in records for name, (error, limit) in each.get("errors", {}).items()}


def _to_json(shapes: KernelShapes | None) -> str:
    if shapes is None:
        return "null"
    return json.dumps(dataclasses.asdict(shapes) | {"dtype": str(shapes.dtype).removeprefix("torch.")})


def _from_json(text: str) -> KernelShapes | None:
    fields = json.loads(text)
    return fields and KernelShapes(**fields | {"dtype": getattr(torch, fields["dtype"])})


def main(module: str, device: str, shapes: str, report: str) -> None:
    """The process: run the checks of a module and write each result to ``report`` as a line of JSON."""
    faulthandler.enable()
    # With deterministic algorithms, torch fills new tensors with nan: what a kernel fails to write is found.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with open(report, "a", encoding="utf-8", buffering=1) as file:

        def write(**record: object) -> None:
            file.write(json.dumps(record) + "\n")

        try:
            for case, measure in importlib.import_module(module).checks(torch.device(device), _from_json(shapes)):
                write(case=case)
                write(errors=measure())
        except Exception as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            write(error=f"{type(error).__name__}: {first_line}"[:500])
        else:
            write(done=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
