"""Self-check kernels in a process of their own, where a fault cannot stop the run; cache the results on disk.

An illegal access breaks CUDA for its process, a compiler or driver fault may kill it, and a wrong kernel may never end.
A fault refuses the operator being checked; a new process checks the others. The processes of a host take turns.
"""

import faulthandler
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hstu.base.files import cache_directory, digest_of, replace_text
from hstu.ops.compile_ahead import compile_all, describe, num_cores
from hstu.ops.cpu.build import KernelsUnavailable, keep_freed_memory, library_file
from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.self_check import CPU_HEAD_DIMS, Check, checks, is_usable

log = logging.getLogger(__name__)

CHECKS = "hstu.ops.self_check"
"""Module that defines ``checks`` and ``jobs``."""
PACKAGES = {Backend.TRITON: "triton", Backend.CUTLASS: "nvidia-cutlass-dsl"}
TIME_LIMIT_S = 240.0
"""Longest time to compile one kernel, to run one case, or to import modules before the first case."""
POLL_S = 0.5
KILL_S = 10.0
"""Longest wait for a killed process, which may be stuck in the driver."""
FAILURE_S = 3600.0
"""A failed check is repeated after this time: another process may have filled the memory of the GPU."""
ROOT = Path(__file__).parents[2]
DRIVER = Path("/proc/driver/nvidia/version")
Decided = dict[str, str | None]
"""Operator → why it is refused; None: its kernel is correct."""


def refusals(
    backend: Backend, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
) -> dict[str, str]:
    """Return operator → why its GPU kernel cannot be used. ``shapes=None`` checks only shape-independent kernels."""
    package = PACKAGES[backend]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return dict.fromkeys(operators, f"{package} is not installed")
    sources = digest_of((ROOT / "hstu" / "ops" / backend).glob("*.py"))
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    driver = DRIVER.read_text() if DRIVER.exists() else ""
    made_by = (sources, version, torch.__version__, torch.version.cuda, gpu, driver, shapes)
    key = f"{backend}_{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}"

    def check(waiting: Sequence[str]) -> Decided:
        decided: Decided = {}
        while rest := [operator for operator in waiting if operator not in decided]:
            decided |= _check_some(backend, device, shapes, rest)
        return decided

    return remembered(key, operators, check)


def refusals_on_cpu(operators: Sequence[str]) -> dict[str, str]:
    """Like :func:`refusals`, for the C++ kernels, in this process; takes two seconds."""

    def check(waiting: Sequence[str]) -> Decided:
        all_shapes = [KernelShapes(dim, 3, 51, dim, torch.float32, True, dim < 32) for dim in CPU_HEAD_DIMS]
        cpu = torch.device("cpu")
        cases = [check for shapes in all_shapes for check in checks(Backend.CPU, cpu, shapes)]
        chosen = sorted((case for case in cases if case.operator in waiting), key=attrgetter("operator"))
        return _decided(waiting, 0, list(_measured(chosen, cpu)), "")

    try:
        library = library_file()
    except KernelsUnavailable as problem:
        return dict.fromkeys(operators, f"there are no C++ kernels for this CPU: {problem}")
    keep_freed_memory()
    return remembered(library.stem, operators, check)


def remembered(key: str, operators: Sequence[str], check: Callable[[Sequence[str]], Decided]) -> dict[str, str]:
    """Operators that ``check`` refuses, and why. Cached by ``key``, which covers machine code, GPU and driver."""
    try:
        file = cache_directory() / "checks.json"
        with FileLock(file.with_suffix(".lock")):
            now, everything = time.time(), dict[str, Any]()
            with suppress(FileNotFoundError, ValueError):
                everything = json.loads(file.read_text(encoding="utf-8"))
            known = everything.setdefault(key, {})
            for operator, (reason, checked_at) in list(known.items()):
                if reason is not None and now - checked_at > FAILURE_S:
                    del known[operator]
            if unknown := [operator for operator in operators if operator not in known]:
                known |= {operator: (reason, now) for operator, reason in check(unknown).items()}
                replace_text(file, json.dumps(everything))
    except OSError as error:
        log.info("the check of kernels cannot be remembered (%s)", error)
        known = {operator: (reason, 0.0) for operator, reason in check(operators).items()}
    return {operator: known[operator][0] for operator in operators if known[operator][0] is not None}


def _check_some(
    backend: Backend, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
) -> Decided:
    """Check in one process. It may end early, but decides at least one operator."""
    log.info("kernel check of %s, once per machine and shapes: %s", backend, ", ".join(operators))
    begun = time.monotonic()
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "report", Path(folder) / "output"
        report.touch()
        chosen = pickle.dumps(shapes).hex(), ",".join(operators)
        arguments = CHECKS, backend, str(device), capability, *chosen, str(report)
        try:
            code = _exit_code([sys.executable, "-m", "hstu.ops.check_process", *arguments], report, output)
        except OSError as error:
            return dict.fromkeys(operators, f"its self check cannot be started: {error}")
        records = []
        for line in report.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # the process was killed while it wrote
                records.append(json.loads(line))
        decided = _decided(operators, code, records, output.read_text(encoding="utf-8", errors="replace"))
    passed = [operator for operator, reason in decided.items() if reason is None]
    errors = [each for record in records if record["operator"] in passed for each in record.get("errors", {}).values()]
    log.info(
        "kernel check of %s: passed=%d refused=%d worst_error=%.0f%% of tolerance time=%.0fs",
        backend,
        len(passed),
        len(decided) - len(passed),
        100 * max((error / tolerance for error, tolerance in errors if tolerance), default=0.0),
        time.monotonic() - begun,
    )
    return decided


def _exit_code(command: list[str], report: Path, output: Path) -> int | None:
    """Exit code of a command that prints to ``output``; None: killed because ``report`` was not touched in time."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
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


def _decided(operators: Sequence[str], code: int | None, records: Sequence[Mapping[str, Any]], output: str) -> Decided:
    """Results of one process. An operator that ended the process is refused; all are if none had begun."""
    decided: Decided = {}
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


def _measured(all_checks: Iterable[Check], device: torch.device) -> Iterator[dict[str, Any]]:
    """Run checks and yield a record per start and per result. Stop when the device has become unusable."""
    for operator, of_operator in groupby(all_checks, attrgetter("operator")):
        try:
            for check in of_operator:
                yield {"operator": operator, "case": check.case}
                yield {"operator": operator, "errors": check.measure()}
        except Exception as error:
            yield {"operator": operator, "error": describe(error)}
            if not is_usable(device):
                return
        else:
            yield {"operator": operator, "complete": True}


def main(module: str, backend: str, device: str, capability: str, shapes: str, operators: str, report: str) -> None:
    """Entry point of the process: compile on all cores, then check. Each result is a line of JSON in ``report``."""
    faulthandler.enable()
    # Deterministic algorithms fill new tensors with nan, which exposes elements that a kernel fails to write.
    torch.use_deterministic_algorithms(True, warn_only=True)
    source, wanted = importlib.import_module(module), operators.split(",")
    of_shapes: KernelShapes | None = pickle.loads(bytes.fromhex(shapes))
    # A kernel that does not compile fails in its check as well.
    for _ in compile_all(source.jobs(backend, of_shapes, int(capability), wanted), num_cores()):
        os.utime(report)
    chosen = (check for check in source.checks(backend, torch.device(device), of_shapes) if check.operator in wanted)
    with open(report, "a", encoding="utf-8", buffering=1) as file:
        for record in _measured(chosen, torch.device(device)):
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
