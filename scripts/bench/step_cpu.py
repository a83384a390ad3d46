"""Time whole training steps on a CPU: the kernel backends, bfloat16, and a padded baseline trainer.

    python scripts/bench/step_cpu.py [--gin-config-file configs/ml_1m_retrieval.gin] [--output docs/benchmarks/step_cpu]

All variants train on the same batches in turn, each in a process of its own. The padded baseline runs twice: as C's
malloc comes, which returns large blocks to the system and pays for their pages again in every step, and with a malloc
that keeps them, as this trainer does. Prints one JSON object: milliseconds per step (median, fastest and all, by the
wall clock and of the processor), ratios to both baselines, peak memory, the parts of a step with their GFLOPS next to
those of large matrix products, and the cost of attention over Σ n² and over B · N². With --output, step.json and
cost.png are written there. The data of the configuration must exist: retrieval of items without context or candidates,
with uniform negatives and a relative bias.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import Shape, movielens_times
from harness import Panel, command_line, draw, products, publish, time_in_turn
from padded_baseline import PaddedBatch, PaddedModel, pad_batch
from torch.profiler import ProfilerActivity, profile, record_function
from training import prepare as prepare_training

from hstu.config.args import NetworkArgs, RetrievalArgs
from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.ops.cpu.operators import OPERATORS
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS
from hstu.parallel import mesh as meshes
from hstu.train.flops import FlopCounter
from hstu.train.sources import open_source
from hstu.train.store_source import StoreSource

VARIANTS = {
    "cpp_float32": ("cutlass", "float32"),
    "cpp_bfloat16": ("cutlass", "bfloat16"),
    "pytorch_float32": ("pytorch", "float32"),
}
"""Name → NetworkArgs.kernel_backend and dtype_str; on a CPU, cutlass means the C++ kernels."""
BASELINES = {
    "padded_baseline": {},
    "padded_baseline_keeping_memory": {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
    },
}
"""Name → environment, which tells C's malloc not to return freed memory to the system."""
AS_ENTRY_SCRIPTS = {"OMP_WAIT_POLICY": "passive"}
"""The environment that the entry scripts set."""
PARTS = {
    "attention, forward": ("attention.forward",),
    "attention, backward": ("attention.backward",),
    "linear layers": ("aten::mm", "aten::addmm"),
    "sampled softmax": ("SampledSoftmaxLoss",),
    "SiLU of the projection": ("aten::silu", "aten::silu_backward"),
    "norm · gate · dropout": ("norm_mul_dropout.forward", "norm_mul_dropout.backward", "aten::ge"),
    "input norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "unit vectors": ("_Unit", "_UnitBackward"),
    "random numbers of dropout": ("aten::random_",),
    "copies, gathers, scatters": ("aten::copy_", "aten::index_select", "aten::index_add_", "aten::scatter_add_"),
}
"""Part of a step → names in the profile. Times are self times on the calling thread."""
CALLS = [*product(("attention", "norm_mul_dropout"), ("forward", "backward"))]
"""Kernels that the profile has no name for: :func:`named_kernels` names them."""
STEPS = 8
Step = Callable[[int], None]
"""Train on the batch of this number."""


@dataclass
class Bench:
    """Configuration, data source and batches for all variants."""

    options: argparse.Namespace
    mesh: meshes.Mesh
    config: RunConfig
    source: StoreSource
    batches: list[HSTUBatch]
    padded: list[PaddedBatch]

    def ours(self, variant: str, *bindings: str) -> tuple[Step, GRModel]:
        """A training step of a variant of this package, and its model."""
        backend, dtype = VARIANTS[variant]
        kernels = [f"NetworkArgs.kernel_backend = '{backend}'", f"NetworkArgs.dtype_str = '{dtype}'"]
        file = self.options.gin_config_file
        told = [*self.options.bindings, *kernels, *bindings]
        run = prepare_training(file, told, "retrieval", self.mesh, self.source)

        def step(number: int) -> None:
            run.pipeline.progress(iter([self.batches[number]]))

        return step, run.model

    def baseline(self, *bindings: str) -> tuple[Step, PaddedModel]:
        """A training step of the padded baseline, and its model."""
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
        """A training step of any variant."""
        return self.baseline()[0] if variant in BASELINES else self.ours(variant)[0]


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
    return load([options.gin_config_file], [*options.bindings, *bindings], "retrieval")


def loss_difference(bench: Bench) -> float:
    """Relative difference of our loss and the baseline's, with the same weights and no dropout."""
    quiet = "NetworkArgs.hidden_dropout = 0.0"
    _, model = bench.ours("cpp_float32", quiet)
    _, padded = bench.baseline(quiet)
    padded.copy_weights(model)
    with torch.no_grad():
        output = model(bench.batches[0])
        ours, theirs = float(output.loss_sum / output.num_labels), float(padded(bench.padded[0]))
    return abs(ours - theirs) / theirs


class Trainer:
    """A process that trains one variant on all batches whenever it is told to; ``env`` is its environment beside ours.

    Steps follow each other as in training: the first after another process has had its turn finds cold caches.
    """

    def __init__(self, options: argparse.Namespace, variant: str, env: Mapping[str, str]) -> None:
        self.wall_ms: list[float] = []
        self.processor_ms: list[float] = []
        config = ["--gin-config-file", options.gin_config_file, "--bindings", *options.bindings]
        size = ["--batches", str(options.batches), "--threads", str(options.threads)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--train", variant, *size, *config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
        self.memory = {"before_mb": self._answer()["peak_mb"]}

    def train(self, number: int) -> None:
        """Train on each batch once and wait for that; ``number`` is the round's. Times are those of an average step."""
        assert self._process.stdin
        print(number, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.wall_ms.append(answer["wall_ms"])
        self.processor_ms.append(answer["processor_ms"])
        self.memory["peak_mb"] = answer["peak_mb"]

    def end(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"a training process ended with exit code {self._process.wait()}; its message is above")


def train_as_told(options: argparse.Namespace) -> None:
    """The process of a :class:`Trainer`."""
    bench = prepare(options)
    step = bench.step(options.train)

    def answer(**times: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"peak_mb": round(peak / 1024), **times}), flush=True)

    answer()
    for _ in sys.stdin:
        begun, processor = time.perf_counter(), time.process_time()
        for batch in range(len(bench.batches)):
            step(batch)
        wall, processor = time.perf_counter() - begun, time.process_time() - processor
        per_step = 1e3 / len(bench.batches)
        answer(wall_ms=round(wall * per_step, 2), processor_ms=round(processor * per_step, 2))


def time_variants(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of all variants, and their memory."""
    environments = dict.fromkeys(VARIANTS, AS_ENTRY_SCRIPTS) | BASELINES
    trainers = {name: Trainer(options, name, env) for name, env in environments.items()}
    time_in_turn({name: each.train for name, each in trainers.items()}, torch.device("cpu"), options.rounds)
    for each in trainers.values():
        each.end()
    times = {name: each.wall_ms[-options.rounds :] for name, each in trainers.items()}
    processor = {name: each.processor_ms[-options.rounds :] for name, each in trainers.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ms_median": {name: round(value, 1) for name, value in medians.items()},
        "ms_fastest": {name: round(min(values), 2) for name, values in times.items()},
        "processor_ms_median": {name: round(statistics.median(values), 1) for name, values in processor.items()},
        "times_as_fast_as": {
            baseline: {
                name: {
                    "median": round(medians[baseline] / medians[name], 2),
                    "fastest": round(min(times[baseline]) / min(times[name]), 2),
                    "processor": round(statistics.median(processor[baseline]) / statistics.median(processor[name]), 2),
                }
                for name in VARIANTS
            }
            for baseline in BASELINES
        },
        "ms_all": times,
        "memory": {name: each.memory for name, each in trainers.items()},
    }


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The whole report."""
    timed = time_variants(options)
    bench = prepare(options)
    flops = FlopCounter(bench.config.network, bench.source.roles)
    ceiling = products(torch.device("cpu"))
    begun = time.perf_counter()
    list(islice(bench.source.train_batches(SamplerPosition()), len(bench.batches)))
    assembly_ms = (time.perf_counter() - begun) * 1e3 / len(bench.batches)
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": [flops.count(batch)[0] for batch in bench.batches],
        "pairs": [int((batch.item_lengths**2).sum()) for batch in bench.batches],
        "loss_difference": loss_difference(bench),
        **timed,
        "batch_assembly_ms": round(assembly_ms, 1),
        "matmul_gflops": ceiling,
        "parts": {
            name: parts_of_a_step(bench.step(name), bench.batches, bench.config.network, ceiling[VARIANTS[name][1]])
            for name in ("cpp_float32", "cpp_bfloat16")
        },
        "attention_cost": attention_costs(),
    }


def _processor_seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def parts_of_a_step(
    step: Callable[[int], None], batches: Sequence[HSTUBatch], network: NetworkArgs, ceiling: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of a step, its GFLOPS and their share of ``ceiling``; then of everything else."""
    for batch in range(len(batches)):
        step(batch)
    with named_kernels(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        begun = time.perf_counter()
        for number in range(STEPS):
            step(number % len(batches))
        whole_ms = (time.perf_counter() - begun) * 1e3 / STEPS
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        spent[event.key] += event.self_cpu_time_total / 1e3 / STEPS
    flops = flops_of_parts(batches, network)
    parts: dict[str, dict[str, float]] = {}
    for name, keys in PARTS.items():
        ms = sum(spent[key] for key in keys)
        parts[name] = {"ms": round(ms, 2)}
        if name in flops:
            gflops = flops[name] / ms / 1e6
            parts[name] |= {"gflops": round(gflops, 1), "of_ceiling": round(gflops / ceiling, 3)}
    known = sum(part["ms"] for part in parts.values())
    return parts | {"everything else": {"ms": round(whole_ms - known, 2)}, "profiled step": {"ms": round(whole_ms, 2)}}


@contextmanager
def named_kernels() -> Iterator[None]:
    """Within the context, the profile lists CALLS as ``operator.forward`` and ``operator.backward``."""
    original = [(operator, name, getattr(OPERATORS[operator], name)) for operator, name in CALLS]
    for operator, name, function in original:  # models hold these objects, which are frozen
        object.__setattr__(OPERATORS[operator], name, record_function(f"{operator}.{name}")(function))
    try:
        yield
    finally:
        for operator, name, function in original:
            object.__setattr__(OPERATORS[operator], name, function)


def flops_of_parts(batches: Sequence[HSTUBatch], network: NetworkArgs) -> dict[str, float]:
    """Floating-point operations of an average step; masked pairs are not counted."""
    tokens = np.mean([batch.item_lengths.sum() for batch in batches])
    pairs = np.mean([(batch.item_lengths * (batch.item_lengths + 1) // 2).sum() for batch in batches])
    scores = np.mean([batch.negatives.draws.numel() for batch in batches if batch.negatives.draws is not None])
    layers, inner = network.num_layers, network.num_attention_heads * network.kv_channels
    return {
        "attention, forward": layers * 4 * inner * float(pairs),
        "attention, backward": layers * 10 * inner * float(pairs),
        "linear layers": layers * 3 * 2 * network.hidden_size * 5 * inner * float(tokens),
        "sampled softmax": 6 * network.item_width * float(scores),
    }


def attention_costs(width: int = 50, repeats: int = 5) -> list[dict[str, Any]]:
    """Milliseconds of attention, forward and backward, for batches with more and less equal lengths.

    Measured as processor time on one thread, which other processes hardly affect.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    costs = []
    for longest in (100, 200, 400, 800):
        for name, lengths in {
            "all equal": np.full(64, longest),
            "uniform": rng.integers(1, longest + 1, 64),
            "one long, others short": np.append(rng.integers(1, 21, 63), longest),
        }.items():
            lengths = lengths.astype(np.int64)
            layout = Shape(lengths, 1, width).layout(torch.device("cpu"), movielens_times(lengths, rng))
            inputs = [torch.randn(layout.num_tokens, 1, width, requires_grad=True) for _ in range(3)]
            tables = [torch.randn(n, requires_grad=True) for n in (2 * longest - 1, NUM_TIME_BUCKETS)]

            def run(layout=layout, inputs=inputs, tables=tables) -> None:  # type: ignore[no-untyped-def]
                q, k, v = inputs
                bias = RelativeBias(*tables)
                config, kernels = AttentionConfig(0.1, 200), OPERATORS["attention"]
                out = hstu_attention(q, k, v, layout, config, bias, kernels)
                torch.autograd.grad(out.sum(), [*inputs, *tables])

            best = min(_processor_seconds(run) for _ in range(repeats))
            square = int((lengths**2).sum())
            padded = len(lengths) * longest**2
            costs.append({"lengths": name, "sum_n2": square, "b_n2": padded, "ms": round(best * 1e3, 3)})
    torch.set_num_threads(threads)
    return costs


def draw_costs(costs: Sequence[dict[str, Any]], image: Path) -> None:
    """Two panels: the cost over Σ n², where all points are on one line, and over B · N², where they scatter."""
    panels = []
    for key, label in (("sum_n2", "Σ n²"), ("b_n2", "B · N²")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for cost in costs:
            lines.setdefault(f"lengths {cost['lengths']}", []).append((cost[key], cost["ms"]))
        panels.append(Panel(f"cost over {label}", f"{label} (pairs of tokens)", "CPU ms", lines))
    draw(panels, image, "Attention, forward and backward")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of a :class:`Trainer`, and of every benchmark."""
    parser = command_line(description, rounds=6, threads=0, output=True)
    parser.add_argument("--gin-config-file", default="configs/ml_1m_retrieval.gin")
    parser.add_argument("--batches", type=int, default=4, help="batches that the steps cycle through")
    parser.add_argument("--bindings", nargs="*", default=[], help="gin bindings beside the file's")
    return parser


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--train", choices=(*VARIANTS, *BASELINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_as_told(options)
        return
    report = measure(options)
    publish(report, options.output and options.output / "step.json")
    if options.output:
        draw_costs(report["attention_cost"], options.output / "cost.png")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
