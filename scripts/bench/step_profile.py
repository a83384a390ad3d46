"""Where the time of a training step on the host goes, for a gin file; one JSON object.

python scripts/bench/step_profile.py retrieval configs/ml_1m_retrieval.gin [--steps 10 --bindings ...]

From torch's profiler with every Python call in it. A module of ours is charged with what its functions do and have
libraries do for them: "Python" is time in the interpreter and in NumPy, "kernels" in torch's operators, their dispatch
included. TorchRec and the backward pass ("autograd", but for the functions of ours that it calls) are charged apart.
Recording slows Python down and leaves kernels as they are; the milliseconds of a step without it are given beside. A
table goes to standard error. One process; batches are made in it, so that making them is seen.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import RecordScope, _EventType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.config.gin_io import load
from hstu.data.sampler import SamplerPosition
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.train.builder import build_model, build_pipeline
from hstu.train.sources import open_source

ROOMS = re.compile(r"hstu/[\w/]+\.py|(?:torchrec|fbgemm_gpu|megatron)(?=/)")
WARM_UP_STEPS = 5
LONGEST = 12
Row = dict[str, float]
"""{"python", "kernels"}: milliseconds a step."""


def training_step(options: argparse.Namespace) -> Callable[[], Any]:
    """A step of the run that the options describe."""
    mesh = meshes.start()
    torch.set_num_threads(options.threads)
    bindings = [*options.bindings, "TrainerArgs.data_workers = 0"]
    config = load([options.gin_file], bindings, options.task)
    source = open_source(config, mesh)
    meshes.seed_initial_weights(config.trainer.seed)
    model, optimizers = build_model(config, source, mesh)
    pipeline = build_pipeline(config.trainer, model, optimizers, mesh)
    batches = source.train_batches(SamplerPosition())
    return lambda: pipeline.progress(batches)


@dataclass
class Charges:
    """Nanoseconds of the recorded steps."""

    modules: dict[str, Row] = field(default_factory=lambda: defaultdict(lambda: {"python": 0.0, "kernels": 0.0}))
    functions: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Python functions, by the time that is their own."""
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Operators likewise."""

    def add(self, event: Any, owner: str) -> None:
        """Charge an event of the profiler's tree, with all below it, that happens on behalf of ``owner``."""
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
    """What an event consists of, without the ranges that libraries name.

    Those begin in one Python call and end in another, and what happens within lies beside them in the tree.
    """
    for child in event.children:
        if child.tag == _EventType.TorchOp and child.extra_fields.scope == RecordScope.USER_SCOPE:
            yield from _parts_of(child)
        else:
            yield child


def record(step: Callable[[], Any], steps: int) -> tuple[Charges, float]:
    """What is charged to whom in so many steps, and the seconds that they took."""
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
    """A function of its own, to be found again among what was recorded."""
    for _ in range(steps):
        step()


def _calls_of(function: str, events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.name.endswith(f": {function}"):
            yield event
        else:
            yield from _calls_of(function, event.children)


def rooms(modules: dict[str, Row]) -> dict[str, Row]:
    """The modules of a room of ours together, the longest first."""
    merged: dict[str, Row] = defaultdict(lambda: {"python": 0.0, "kernels": 0.0})
    for module, row in modules.items():
        for kind, time_spent in row.items():
            merged[".".join(module.split(".")[:2])][kind] += time_spent
    return longest_first(merged)


def longest_first(modules: dict[str, Row]) -> dict[str, Row]:
    """By the sum of a row."""
    return dict(sorted(modules.items(), key=lambda item: -sum(item[1].values())))


def longest(times: dict[str, float]) -> list[tuple[str, float]]:
    """The LONGEST names, each with its time."""
    return sorted(times.items(), key=lambda item: -item[1])[:LONGEST]


def scaled(value: Any, factor: float) -> Any:
    """Each number of lists and mappings times ``factor``, to three places."""
    if isinstance(value, dict):
        return {key: scaled(each, factor) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [scaled(each, factor) for each in value]
    return round(value * factor, 3) if isinstance(value, int | float) else value


def print_tables(report: dict[str, Any]) -> None:
    """As Markdown, on standard error."""
    print(f"{report['step_ms']:.1f} ms a step, {report['recorded_step_ms']:.1f} ms while recorded", file=sys.stderr)
    print("| ms a step | Python | kernels |\n|---|---:|---:|", file=sys.stderr)
    for whose, row in report["rooms"].items():
        print(f"| {whose} | {row['python']:.2f} | {row['kernels']:.2f} |", file=sys.stderr)
    for name in ("python_functions", "kernels"):
        print(f"\n{name}", *(f"{ms:8.2f}  {which}" for which, ms in report[name]), sep="\n", file=sys.stderr)


def main() -> None:
    """Time, then profile twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("ranking", "retrieval"))
    parser.add_argument("gin_file")
    parser.add_argument("--bindings", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=10, help="timed, and again as many recorded")
    parser.add_argument("--threads", type=int, default=1)
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
        "options": vars(options),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in times.items()},
        "recorded_step_ms": round(1e3 * recorded_s / options.steps, 3),
        **scaled(charged, 1e-6 / options.steps),
    }
    print_tables(report)
    print(json.dumps(report))
    meshes.finish()


if __name__ == "__main__":
    main()
