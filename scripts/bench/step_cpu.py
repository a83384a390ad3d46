"""Time whole training steps on a CPU: the kernel backends, bfloat16, and a padded trainer written the plain way.

    python scripts/bench/step_cpu.py [--gin-config-file configs/ml_1m_retrieval.gin] [--output docs/benchmarks/step_cpu]

All are timed on the same batches in turn, in one process. Prints one JSON object: milliseconds a step (median and all),
ratios to the padded baseline, peak memory of each in a process of its own, the parts of a step with their GFLOPS beside
those of large matrix products, and the cost of attention over sum of n² and over B N². With --output also writes
step.json and cost.png there. Needs the data of the configuration: retrieval of items without context or candidates,
uniform negatives and a relative bias.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from padded_baseline import PaddedBatch, PaddedModel, pad_batch
from step_cpu_parts import attention_costs, draw_costs, parts_of_a_step
from timing import products

from hstu.config.args import RetrievalArgs
from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.train.builder import build_model, build_pipeline
from hstu.train.sources import StoreSource, open_source
from hstu.train.work import StepWork

VARIANTS = {
    "cpp_float32": ("cutlass", "float32"),
    "cpp_bfloat16": ("cutlass", "bfloat16"),
    "pytorch_float32": ("pytorch", "float32"),
}
"""Name → NetworkArgs.kernel_backend and dtype_str; on a CPU, cutlass means the C++ kernels."""
BASELINE = "padded_baseline"
Step = Callable[[int], None]
"""Train on the batch of this number."""


@dataclass
class Bench:
    """What all variants share."""

    options: argparse.Namespace
    mesh: meshes.Mesh
    config: RunConfig
    source: StoreSource
    batches: list[HSTUBatch]
    padded: list[PaddedBatch]

    def ours(self, variant: str, *bindings: str) -> tuple[Step, GRModel]:
        """A step of ours, and its model."""
        backend, dtype = VARIANTS[variant]
        config = _load(
            self.options, f"NetworkArgs.kernel_backend = '{backend}'", f"NetworkArgs.dtype_str = '{dtype}'", *bindings
        )
        meshes.seed_initial_weights(config.trainer.seed)
        model, optimizers = build_model(config, self.source, self.mesh)
        pipeline = build_pipeline(config.trainer, model, optimizers, self.mesh)

        def step(number: int) -> None:
            pipeline.progress(iter([self.batches[number]]))

        return step, model

    def baseline(self, *bindings: str) -> tuple[Step, PaddedModel]:
        """A step of the padded baseline, and its model."""
        config = _load(self.options, *bindings)
        task, network = config.task_args, config.network
        assert isinstance(task, RetrievalArgs)
        items = self.source.cardinalities[self.source.roles.item]
        model = PaddedModel(network, items, self.source.max_items, task.temperature, task.l2_norm_eps)
        betas = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.learning_rate, betas=betas)

        def step(number: int) -> None:
            optimizer.zero_grad()
            model(self.padded[number]).backward()
            optimizer.step()

        return step, model

    def step(self, variant: str) -> Step:
        """A step of any variant."""
        return self.baseline()[0] if variant == BASELINE else self.ours(variant)[0]


def prepare(options: argparse.Namespace) -> Bench:
    """Read the batches."""
    quiet_libraries()
    config = _load(options)
    mesh = meshes.start(seed=config.trainer.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_source(config, mesh)
    assert isinstance(source, StoreSource)
    batches = list(islice(source.train_batches(SamplerPosition()), options.batches))
    return Bench(options, mesh, config, source, batches, [pad_batch(batch, source.roles.item) for batch in batches])


def _load(options: argparse.Namespace, *bindings: str) -> RunConfig:
    return load([options.gin_config_file], list(bindings), "retrieval")


def interleaved(steps: dict[str, Step], rounds: int, batches: int) -> dict[str, list[float]]:
    """Milliseconds of each variant's steps, a step of each in turn, after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):
        for name, step in steps.items():
            begun = time.perf_counter()
            step(number % batches)
            if number >= 0:
                times[name].append(round((time.perf_counter() - begun) * 1e3, 2))
    return times


def loss_difference(bench: Bench) -> float:
    """Of our loss and the baseline's, relative, with the same weights and no dropout: it is the same mathematics."""
    quiet = "NetworkArgs.hidden_dropout = 0.0"
    _, model = bench.ours("cpp_float32", quiet)
    _, padded = bench.baseline(quiet)
    padded.copy_weights(model)
    with torch.no_grad():
        output = model(bench.batches[0])
        ours, theirs = float(output.loss_sum / output.num_labels), float(padded(bench.padded[0]))
    return abs(ours - theirs) / theirs


def peak_memory_mb(options: argparse.Namespace, variant: str) -> dict[str, float]:
    """Resident memory of a process that trains three steps of a variant: before the first, and at its peak."""
    command = [sys.executable, __file__, "--memory-of", variant, "--gin-config-file", options.gin_config_file]
    with tempfile.TemporaryFile("w+") as errors:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        if result.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read())
    report: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return report


def tell_memory(options: argparse.Namespace) -> None:
    """In a process of its own: see peak_memory_mb."""
    bench = prepare(options)
    step = bench.step(options.memory_of)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(3):
        step(number)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"before_mb": round(before / 1024), "peak_mb": round(peak / 1024)}))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The whole report."""
    memory = {name: peak_memory_mb(options, name) for name in (*VARIANTS, BASELINE)} if options.memory else {}
    bench = prepare(options)
    work = StepWork(bench.config.network, bench.source.roles)
    steps = {name: bench.step(name) for name in (*VARIANTS, BASELINE)}
    difference = loss_difference(bench)
    times = interleaved(steps, options.rounds, len(bench.batches))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ceiling = products(torch.device("cpu"))
    begun = time.perf_counter()
    list(islice(bench.source.train_batches(SamplerPosition()), len(bench.batches)))
    assembly_ms = (time.perf_counter() - begun) * 1e3 / len(bench.batches)
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": [work.of(batch)[0] for batch in bench.batches],
        "pairs": [int((batch.item_lengths**2).sum()) for batch in bench.batches],
        "loss_difference": difference,
        "ms_median": {name: round(value, 1) for name, value in medians.items()},
        "ms_fastest": {name: min(values) for name, values in times.items()},
        "times_as_fast_as_baseline": {name: round(medians[BASELINE] / value, 2) for name, value in medians.items()},
        "ms_all": times,
        "batch_assembly_ms": round(assembly_ms, 1),
        "memory": memory,
        "matmul_gflops": ceiling,
        "parts": {
            name: parts_of_a_step(steps[name], bench.batches, bench.config.network, ceiling[VARIANTS[name][1]])
            for name in ("cpp_float32", "cpp_bfloat16")
        },
        "attention_cost": attention_costs(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin-config-file", default="configs/ml_1m_retrieval.gin")
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--batches", type=int, default=4, help="batches that the steps take in turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--memory-of", choices=(*VARIANTS, BASELINE), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.memory_of:
        tell_memory(options)
        return
    report = measure(options)
    print(json.dumps(report, indent=2))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "step.json").write_text(json.dumps(report, indent=1) + "\n")
        draw_costs(report["attention_cost"], options.output / "cost.png")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
