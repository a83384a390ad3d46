"""Profile the host time of a training step by module, for a gin file; prints one JSON object.

python scripts/bench/step_profile.py retrieval configs/ml_1m_retrieval.gin [--steps 10 --bindings ...]

The times come from torch's profiler, which records every Python call. A module of ours is charged for its functions
and for the library functions that they call. "Python" is time in the interpreter and in NumPy; "kernels" is time in
torch's operators, including their dispatch. TorchRec and the backward pass ("autograd", without our functions that it
calls) are charged separately. Recording slows down Python but not kernels, so the report also has the time of a step
without it. A table is printed to standard error. There is one process, which also makes the batches.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import command_line, publish
from pipeline_cpu import prepare
from torch._C._profiler import RecordScope, _EventType
from torch.profiler import ProfilerActivity, profile

from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes

ROOMS = re.compile(r"hstu/[\w/]+\.py|(?:torchrec|fbgemm_gpu|megatron)(?=/)")
WARM_UP_STEPS = 5
LONGEST = 12
Row = dict[str, float]
"""Nanoseconds, later milliseconds per step, of "python" and "kernels"."""


def training_step(options: argparse.Namespace) -> Callable[[], Any]:
    """One step of the run that the options describe."""
    mesh = meshes.start()
    torch.set_num_threads(options.threads)
    run = prepare(options.gin_file, [*options.bindings, "TrainerArgs.data_workers = 0"], options.task, mesh)
    batches = run.batches()
    return lambda: run.pipeline.progress(batches)


@dataclass
class Charges:
    """Nanoseconds of the recorded steps, by module, function and operator."""

    modules: dict[str, Row] = field(default_factory=lambda: defaultdict(lambda: {"python": 0.0, "kernels": 0.0}))
    functions: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Python function → its self time."""
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Operator → its self time."""

    def add(self, event: Any, owner: str) -> None:
        """Charge an event of the profiler's tree and all events below it; ``owner``: the module that caused it."""
        is_call = event.tag == _EventType.PyCall
        if is_call and (found := ROOMS.search(event.name)):
            owner = found[0].removesuffix(".py").replace("/", ".")
        elif event.tag == _EventType.PyCCall and "run_backward" in event.name:
            owner = "autograd"
        parts = list(_parts_of(event))
        own = event.duration_time_ns - sum(part.duration_time_ns for part in parts)
        is_kernel = event.tag == _EventType.TorchOp
        self.modules[owner]["kernels" if is_kernel else "python"] += own
        if is_call:
            self.functions[event.name] += own
        elif is_kernel:
            self.kernels[event.name] += own
        for part in parts:
            self.add(part, owner)


def _parts_of(event: Any) -> Iterator[Any]:
    """The children of an event, where ranges that libraries have named are replaced by their children.

    Such a range begins in one Python call and ends in another, so the calls within it are its siblings in the tree.
    """
    for child in event.children:
        if child.tag == _EventType.TorchOp and child.extra_fields.scope == RecordScope.USER_SCOPE:
            yield from _parts_of(child)
        else:
            yield child


def record(step: Callable[[], Any], steps: int) -> tuple[Charges, float]:
    """Record ``steps`` steps. Returns their charges and their seconds."""
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as recorded:
        begun = time.perf_counter()
        run_steps(step, steps)
        seconds = time.perf_counter() - begun
    charges = Charges()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    for event in _calls_of(run_steps.__name__, recorded.profiler.kineto_results.experimental_event_tree()):
        charges.add(event, "other")
    return charges, seconds


def run_steps(step: Callable[[], Any], steps: int) -> None:
    """Run the steps. The recording is searched for the name of this function."""
    for _ in range(steps):
        step()


def _calls_of(function: str, events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.name.endswith(f": {function}"):
            yield event
        else:
            yield from _calls_of(function, event.children)


def rooms(modules: dict[str, Row]) -> dict[str, Row]:
    """The sums over the modules of each of our packages, the longest first."""
    merged: dict[str, Row] = defaultdict(lambda: {"python": 0.0, "kernels": 0.0})
    for module, row in modules.items():
        for kind, time_spent in row.items():
            merged[".".join(module.split(".")[:2])][kind] += time_spent
    return longest_first(merged)


def longest_first(modules: dict[str, Row]) -> dict[str, Row]:
    """Sort by the sum of each row."""
    return dict(sorted(modules.items(), key=lambda item: -sum(item[1].values())))


def longest(times: dict[str, float]) -> list[tuple[str, float]]:
    """The names with the longest times, and their times."""
    return sorted(times.items(), key=lambda item: -item[1])[:LONGEST]


def scaled(value: Any, factor: float) -> Any:
    """Multiply each number in lists and mappings by ``factor`` and round it to three places."""
    if isinstance(value, dict):
        return {key: scaled(each, factor) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [scaled(each, factor) for each in value]
    return round(value * factor, 3) if isinstance(value, int | float) else value


def print_tables(report: dict[str, Any]) -> None:
    """Print the report as Markdown to standard error."""
    print(f"{report['step_ms']:.1f} ms per step, {report['recorded_step_ms']:.1f} ms while recorded", file=sys.stderr)
    print("| ms per step | Python | kernels |\n|---|---:|---:|", file=sys.stderr)
    for package, row in report["rooms"].items():
        print(f"| {package} | {row['python']:.2f} | {row['kernels']:.2f} |", file=sys.stderr)
    for name in ("python_functions", "kernels"):
        print(f"\n{name}", *(f"{ms:8.2f}  {which}" for which, ms in report[name]), sep="\n", file=sys.stderr)


def main() -> None:
    """Time steps, then record steps, and print both."""
    parser = command_line(__doc__, threads=1, output=True)
    parser.add_argument("task", choices=("ranking", "retrieval"))
    parser.add_argument("gin_file")
    parser.add_argument("--bindings", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=10, help="timed steps; as many are recorded afterwards")
    options = parser.parse_args()
    quiet_libraries()
    step = training_step(options)
    for _ in range(WARM_UP_STEPS):
        step()
    seconds = []
    for _ in range(options.steps):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    charges, recorded_s = record(step, options.steps)
    charged = {
        "rooms": rooms(charges.modules),
        "modules": longest_first(charges.modules),
        "python_functions": longest(charges.functions),
        "kernels": longest(charges.kernels),
    }
    times = {"step": statistics.mean(seconds), "median_step": statistics.median(seconds)}
    report = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in times.items()},
        "recorded_step_ms": round(1e3 * recorded_s / options.steps, 3),
        **scaled(charged, 1e-6 / options.steps),
    }
    print_tables(report)
    publish(report, options.output)
    meshes.finish()


if __name__ == "__main__":
    main()
