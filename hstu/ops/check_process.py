"""Checks the kernels of a GPU backend in a process of their own, so that no fault in them can end or stop a run.

An illegal access makes CUDA unusable for its process, a fault in a compiler or driver may kill the process, and a wrong
kernel may never end. Each of these refuses the operator at fault with a reason. A new process checks the operators
that are left.

The result of each operator is remembered on disk for these kernels, versions, GPU, driver and shapes. The processes of
a host check one after the other, so that the first one checks for all.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hstu.base.files import replace_text
from hstu.ops.kernels import KernelShapes
from hstu.ops.self_check import cache_directory, describe, is_usable

log = logging.getLogger(__name__)

TIME_LIMIT_S = 240.0
"""Longest time for one kernel to compile, for one case, and for the imports before the first one."""
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
    compiler: str | None = None
    """Module with ``jobs``: see :mod:`hstu.ops.compile_ahead`. None: cases compile their kernels."""


def refusals(
    kernels: Checked, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
) -> dict[str, str]:
    """Operator → why its kernel cannot be used on a GPU. The kernels of the other operators agree with PyTorch.

    Args:
        kernels: The backend.
        device: The GPU.
        shapes: The shapes of the run; None: of what does not depend on them.
        operators: Those to check.
    """
    try:
        version = importlib.metadata.version(kernels.package)
    except importlib.metadata.PackageNotFoundError:
        return dict.fromkeys(operators, f"{kernels.package} is not installed")
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / f"{kernels.name.lower()}_kernels_{_key(kernels, version, device, shapes)}.json"
        with FileLock(record.with_suffix(".lock")):
            known = _remembered(record)
            if unknown := [operator for operator in operators if operator not in known]:
                known |= _check(kernels, device, shapes, unknown)
                _remember(record, known)
    except OSError as error:
        log.info("the check of the %s kernels cannot be remembered (%s)", kernels.name, error)
        known = _check(kernels, device, shapes, operators)
    return {operator: reason for operator in operators if (reason := known[operator]) is not None}


def _key(kernels: Checked, version: str, device: torch.device, shapes: KernelShapes | None) -> str:
    """A hash of everything that decides the machine code and what runs it."""
    digest = hashlib.sha256()
    for source in sorted(kernels.sources.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    driver = DRIVER.read_text() if DRIVER.exists() else ""
    digest.update(repr((kernels.module, version, torch.__version__, torch.version.cuda, gpu, driver, shapes)).encode())
    return digest.hexdigest()[:16]


def _remembered(record: Path) -> dict[str, str | None]:
    """The results of earlier checks by operator, without failures that are too old; none if they are unreadable."""
    try:
        known = dict(json.loads(record.read_text(encoding="utf-8")))
        is_recent = time.time() - record.stat().st_mtime < FAILURE_S
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {operator: reason for operator, reason in known.items() if reason is None or is_recent}


def _remember(record: Path, known: Mapping[str, str | None]) -> None:
    replace_text(record, json.dumps(known))


def _check(
    kernels: Checked, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
) -> dict[str, str | None]:
    """Operator → why it is refused, None: it is right; by processes that check it now."""
    if kernels.compiler is not None:
        _compile(kernels.name, kernels.compiler, device, shapes, operators)
    decided: dict[str, str | None] = {}
    while waiting := [operator for operator in operators if operator not in decided]:
        decided |= _check_some(kernels, device, shapes, waiting)
    return decided


def _compile(
    name: str, compiler: str, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
) -> None:
    """Compile on all cores what the check launches. A kernel that does not compile fails in the check, too."""
    begun = time.monotonic()
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "report", Path(folder) / "output"
        report.touch()
        command = [sys.executable, "-m", "hstu.ops.compile_ahead", compiler, capability, to_json(shapes)]
        with suppress(OSError):
            _exit_code([*command, ",".join(operators), str(report)], report, output)
        errors = [record["error"] for record in _records(report.read_text(encoding="utf-8"))]
    failed = len(errors) - errors.count(None)
    log.info(
        "kernel compilation for %s: compiled=%d failed=%d time=%.0fs",
        name, errors.count(None), failed, time.monotonic() - begun,
    )  # fmt: skip


def _check_some(
    kernels: Checked, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
) -> dict[str, str | None]:
    """As :func:`_check` by one process, which may end early, but decides one operator at least."""
    log.info("kernel check of %s, once per machine and shapes: %s", kernels.name, ", ".join(operators))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "report", Path(folder) / "output"
        report.touch()
        command = [sys.executable, "-m", "hstu.ops.check_process", kernels.module, str(device), to_json(shapes)]
        try:
            code = _exit_code([*command, ",".join(operators), str(report)], report, output)
        except OSError as error:
            return dict.fromkeys(operators, f"its self check cannot be started: {error}")
        records = list(_records(report.read_text(encoding="utf-8", errors="replace")))
        decided = _decided(operators, code, records, output.read_text(encoding="utf-8", errors="replace"))
    passed = [operator for operator, reason in decided.items() if reason is None]
    errors = [each for record in records if record["operator"] in passed for each in record.get("errors", {}).values()]
    log.info(
        "kernel check of %s: passed=%d refused=%d worst_error=%.0f%% of tolerance time=%.0fs",
        kernels.name,
        len(passed),
        len(decided) - len(passed),
        100 * max((error / tolerance for error, tolerance in errors if tolerance), default=0.0),
        time.monotonic() - begun,
    )
    return decided


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


def _decided(
    operators: Sequence[str], code: int | None, records: Sequence[Mapping[str, Any]], output: str
) -> dict[str, str | None]:
    """What a process has found: operator → why it is refused, None: it is right.

    An operator that ended the process is refused; all are, if none was begun.
    """
    decided: dict[str, str | None] = {}
    current, case = None, "its start"
    for record in records:
        current, case = record["operator"], record.get("case", case)
        if "error" in record:
            decided[current] = f"the self check raised {record['error']}, in {case}"
        for name, (error, tolerance) in record.get("errors", {}).items():
            if not error <= tolerance:
                decided.setdefault(
                    current,
                    f"{name} differs from PyTorch by {error:.2g}, more than {tolerance} (relative error): please "
                    "report this with the versions of the compiler and of the driver",
                )
        if "complete" in record:
            decided.setdefault(current, None)
    if current not in decided:
        if code is None:
            what = f"did not go on for {TIME_LIMIT_S:.0f} s"
        elif code < 0:
            what = f"was killed by {signal.Signals(-code).name}"
        else:
            last_line = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
            what = f"ended with exit code {code} ({last_line})"
        ended = operators if current is None else [current]
        decided |= dict.fromkeys(ended, f"the self check {what}, in {case}")
    return decided


def _records(text: str) -> Iterator[Mapping[str, Any]]:
    for line in text.splitlines():
        with suppress(ValueError):  # the process was killed while it wrote
            yield json.loads(line)


def to_json(shapes: KernelShapes | None) -> str:
    """Shapes as an argument of a process."""
    if shapes is None:
        return "null"
    return json.dumps(dataclasses.asdict(shapes) | {"dtype": str(shapes.dtype).removeprefix("torch.")})


def from_json(text: str) -> KernelShapes | None:
    """Shapes from an argument of a process."""
    fields = json.loads(text)
    return fields and KernelShapes(**fields | {"dtype": getattr(torch, fields["dtype"])})


def main(module: str, device: str, shapes: str, operators: str, report: str) -> None:
    """The process: check some operators of a module and write each result to ``report`` as a line of JSON."""
    faulthandler.enable()
    # With deterministic algorithms, torch fills new tensors with nan: what a kernel fails to write is found.
    torch.use_deterministic_algorithms(True, warn_only=True)
    on, wanted = torch.device(device), operators.split(",")
    checks = [
        check for check in importlib.import_module(module).checks(on, from_json(shapes)) if check.operator in wanted
    ]
    with open(report, "a", encoding="utf-8", buffering=1) as file:

        def write(operator: str, **record: object) -> None:
            file.write(json.dumps({"operator": operator} | record) + "\n")

        for operator, cases in groupby(checks, attrgetter("operator")):
            try:
                for check in cases:
                    write(operator, case=check.case)
                    write(operator, errors=check.measure())
            except Exception as error:
                write(operator, error=describe(error))
                if not is_usable(on):  # a new process goes on
                    return
            else:
                write(operator, complete=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
