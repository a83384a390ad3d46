"""Shared by the benchmarks: command lines, timing in turn, the limits of a device, and JSON reports.

Importing this file puts the checkout on Python's path, so that a benchmark also runs where hstu is not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hstu.base.files import replace_text  # noqa: E402

Row = dict[str, Any]
"""One record of a report."""
WARM_UP = 2
"""Rounds that are not timed, in which kernels are compiled."""
LAUNCHES = {"cpu": 1, "cuda": 8}
"""Calls that are timed together. A launch costs the host 40 to 80 µs, as much as a small kernel takes."""
ENDED = "the process ended while it was measured"
"""Error of a case that is not measured again."""
_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
_SIZES = {"cpu": (2048, 256 << 20), "cuda": (8192, 1 << 30)}
"""Side of the matrices and bytes of the copy with which the limits of a device are measured."""


@dataclass(frozen=True)
class Pass:
    """What to time: a forward function, and its gradients with respect to ``leaves``."""

    forward: Callable[[], Any]
    """Returns a tensor or a tuple of tensors."""
    leaves: Sequence[Tensor]

    def slopes(self) -> list[Tensor]:
        """A gradient of ones for each output."""
        out = self.forward()
        return [torch.ones_like(each.detach()) for each in ((out,) if isinstance(out, Tensor) else out)]


def runnable(passes: Mapping[str, Pass]) -> tuple[dict[str, Pass], list[Row]]:
    """The passes whose forward and backward run here, and a row with the error of each other one."""
    run, failed = {}, []
    for name, each in passes.items():
        try:
            torch.autograd.grad(each.forward(), each.leaves, each.slopes(), allow_unused=True)
            run[name] = each
        except Exception as error:
            failed.append({"variant": name, "error": describe(error)})
            stop_if_lost()
    return run, failed


def describe(error: BaseException) -> str:
    """The kind of an error and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def stop_if_lost() -> None:
    """End the process if an error has made CUDA unusable for it: another process measures what is left."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(f"the GPU is lost for this process: {describe(error)}") from error


def attempt(report: Row, section: str, case: Row, measure: Callable[[], Sequence[Row]], output: Path | None) -> None:
    """Add a case's rows to a section of the report, and write the report. A case that it has already is skipped.

    Each row begins with the entries of ``case``. An error becomes a row, too. While the case is measured, its row says
    so: that is what stays if the process ends.
    """
    rows = report.setdefault(section, [])
    if any(case.items() <= row.items() for row in rows):
        return
    rows.append(case | {"error": ENDED})
    write(report, output)
    try:
        found = measure()
    except Exception as error:
        found = [{"error": describe(error)}]
    rows[-1:] = [case | row for row in found]
    write(report, output)
    if any("error" in row for row in found):
        stop_if_lost()


def time_passes(passes: Mapping[str, Pass], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each function's forward and backward: the median and the fastest of ``rounds``.

    All take their turn in every round, so that a disturbance of the machine affects all of them. On a GPU, the caches
    are flushed before each call, and several launches share a pair of events, so that the host can be ahead of the
    device; "host_ms" is what the host needs to launch a forward and a backward. Where that is more than the device's
    time, the function waits for the host.
    """
    launches = LAUNCHES[device.type]
    flush = torch.empty(_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in passes}
    grads = {name: each.slopes() for name, each in passes.items()}
    for number in range(rounds + WARM_UP):
        for name, each in passes.items():
            flush.zero_()
            begun = time.perf_counter()
            marks = [_mark(device)]
            for _ in range(launches):
                out = each.forward()
            marks.append(_mark(device))
            forward_s = time.perf_counter() - begun
            flush.zero_()
            begun = time.perf_counter()
            marks.append(_mark(device))
            for _ in range(launches):
                torch.autograd.grad(out, each.leaves, grads[name], retain_graph=launches > 1, allow_unused=True)
            marks.append(_mark(device))
            host_ms = (forward_s + time.perf_counter() - begun) * 1e3
            if number >= WARM_UP:
                spent = _milliseconds(*marks[:2]), _milliseconds(*marks[2:]), host_ms
                times[name].append(tuple(ms / launches for ms in spent))  # type: ignore[arg-type]
            del out
    return {name: _summary(measured, device) for name, measured in times.items()}


def kernel_times(each: Pass, device: torch.device, steps: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel in a forward and backward, by the profiler: on a GPU the device's own time.

    On a CPU the self time of each operator.
    """
    on_gpu, slopes = device.type == "cuda", each.slopes()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            out = each.forward()
            torch.autograd.grad(out, each.leaves, slopes, allow_unused=True)
    return {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / steps
        for event in recorded.key_averages()
    }


def longest_kernels(times: Mapping[str, float], count: int) -> dict[str, float]:
    """The kernels with the longest times, and the sum of all others."""
    names = sorted(times, key=lambda name: -times[name])[:count]
    rest = sum(times.values()) - sum(times[name] for name in names)
    return {name: round(times[name], 3) for name in names} | {"everything else": round(rest, 3)}


def time_in_turn(
    steps: Mapping[str, Callable[[int], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, by the wall clock, from and to an idle device.

    Every step takes the number of the round, counted from 0 with WARM_UP rounds first that are not timed. All steps
    take their turn in every round, and each round begins with another one.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(WARM_UP + rounds):
        for name in order:
            begun = now()
            steps[name](number)
            if number >= WARM_UP:
                times[name].append((now() - begun) * 1e3)
        order = order[1:] + order[:1]
    return times


def _summary(times: Sequence[tuple[float, float, float]], device: torch.device) -> dict[str, float]:
    forward, backward, host = zip(*times, strict=True)
    summary = {
        "forward_ms": round(statistics.median(forward), 3),
        "backward_ms": round(statistics.median(backward), 3),
        "fastest_forward_ms": round(min(forward), 3),
        "fastest_backward_ms": round(min(backward), 3),
    }
    return summary | ({"host_ms": round(statistics.median(host), 3)} if device.type == "cuda" else {})


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begun: Any, ended: Any) -> float:
    if isinstance(begun, float):
        return (float(ended) - begun) * 1e3
    ended.synchronize()
    return float(begun.elapsed_time(ended))


def rates(row: Row, forward: float, backward: float, unit: str) -> Row:
    """``row`` with the rates of its median times; ``forward`` and ``backward`` count operations or bytes."""
    return {
        **row,
        f"forward_{unit}": round(forward / row["forward_ms"] / 1e6, 1),
        f"backward_{unit}": round(backward / row["backward_ms"] / 1e6, 1),
        **rate(row, forward + backward, unit),
    }


def rate(row: Row, amount: float, unit: str) -> Row:
    """The rate of forward and backward together."""
    return {unit: round(amount / (row["forward_ms"] + row["backward_ms"]) / 1e6, 1)}


def ceilings(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """GFLOPS of large matrix products by type, and GB/s read and written by a large copy: the best of ``repeats``."""
    found = {f"{name}_gflops": value for name, value in products(device, repeats).items()}
    size = _SIZES[device.type][1]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = round(2 * size / _best(lambda: target.copy_(source), device, repeats) / 1e6, 1)
    return found


def products(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """GFLOPS of a large matrix product by type, the best of ``repeats``."""
    side, found = _SIZES[device.type][0], {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = _best(lambda a=a, b=b: a @ b, device, repeats)  # type: ignore[misc]
        found[name_of(dtype)] = round(2 * side**3 / best / 1e6, 1)
    return found


def relative_error(computed: Tensor, exact: Tensor) -> float:
    """Norm of the error relative to the norm of ``exact``."""
    exact = exact.detach().double()
    return float(f"{float((computed.detach().double() - exact).norm() / exact.norm()):.2e}")


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + WARM_UP):
        begun = _mark(device)
        run()
        times.append(_milliseconds(begun, _mark(device)))
    return min(times[WARM_UP:])


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype as in NetworkArgs.dtype_str."""
    return str(dtype).removeprefix("torch.")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` by torch.compile, compiled again for every shape."""
    torch._dynamo.config.cache_size_limit = 64
    torch._functorch.config.donated_buffer = False  # backward is called several times: see time_passes
    return torch.compile(function, dynamic=False)


def command_line(
    description: str | None, *, rounds: int | None = None, threads: int | None = None, output: bool = False
) -> argparse.ArgumentParser:
    """A parser with those of the common options for which there is a default."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        result.add_argument("--rounds", type=int, default=rounds, help="timed repetitions of everything, in turn")
    if threads is not None:
        result.add_argument("--threads", type=int, default=threads, help="on a CPU; 0: all that this process may use")
    if output:
        result.add_argument("--output", type=Path, help="also write the results here, each as soon as it exists")
        result.add_argument("--resume", action="store_true", help="keep the results that --output has")
    return result


def operator_command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of the benchmarks that call :func:`begin` and :func:`finish`."""
    result = command_line(description, rounds=10, threads=0, output=True)
    result.add_argument("--device", choices=tuple(_SIZES), default="cpu")
    result.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return result


def begin(options: argparse.Namespace) -> tuple[torch.device, Row]:
    """The device, and the first entries of a report: the device and its limits."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs an NVIDIA GPU; --device cpu does not")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    where = (
        {"device": torch.cuda.get_device_name()} if on_gpu else {"device": "cpu", "threads": torch.get_num_threads()}
    )
    return device, {**where, "torch": torch.__version__, "ceilings": ceilings(device)} | earlier(options)


def finish(report: Row, options: argparse.Namespace) -> None:
    """Measure the limits again, print the report and write it."""
    report["ceilings_after"] = ceilings(torch.device(options.device))
    publish(report, options.output)


def to_json(report: Any) -> str:
    """JSON with one line per entry of ``report`` and one line per record of a list of records."""
    if isinstance(report, dict):
        lines = [f"{json.dumps(key)}: {_value(value)}" for key, value in report.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"
    return _value(report) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(_line(record) for record in value) + "\n]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def publish(report: Any, output: Path | None = None) -> None:
    """Print the report and, where ``output`` names a file, write it there."""
    print(to_json(report), end="")
    write(report, output)


def write(report: Any, output: Path | None) -> None:
    """Replace the file as a whole, so that a reader, or a kill, finds the old report or the new one."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, to_json(report))


def earlier(options: argparse.Namespace) -> Row:
    """With --resume, what an earlier process has written to --output, without the cases that raised an error."""
    found: Row = json.loads(options.output.read_text()) if options.resume and options.output.exists() else {}
    return {
        key: [row for row in value if row.get("error", ENDED) == ENDED] if isinstance(value, list) else value
        for key, value in found.items()
    }
