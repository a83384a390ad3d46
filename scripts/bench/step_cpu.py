"""Time whole training steps on a CPU: the kernel backends, bfloat16, and a padded baseline trainer.

    python scripts/bench/step_cpu.py [--gin-config-file configs/ml_1m_retrieval.gin] [--output step.json]

All variants train on the same batches in turn, each in a process of its own. The padded baseline runs twice: as C's
malloc comes, which returns large blocks to the system and pays for their pages again in every step, and with a malloc
that keeps them, as this trainer does. Prints one JSON object: milliseconds per step (median, fastest and all, by the
wall clock and of the processor), ratios to both baselines, and peak memory. The data of the configuration must exist:
retrieval of items without context or candidates, with uniform negatives and a relative bias.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from harness import command_line, publish, time_in_turn
from padded_baseline import PaddedBatch, PaddedModel, pad_batch
from training import prepare as prepare_training

from hstu.config.args import RetrievalArgs
from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.observe.throughput import FlopCounter
from hstu.parallel import mesh as meshes
from hstu.train.sources import StoreSource, open_source

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
        batch = bench.batches[0]
        ours, theirs = float(model(batch).loss_sum / batch.num_labels_total), float(padded(bench.padded[0]))
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
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": [flops.count(batch)[0] for batch in bench.batches],
        "pairs": [int((batch.item_lengths**2).sum()) for batch in bench.batches],
        "loss_difference": loss_difference(bench),
        **timed,
    }


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
    publish(measure(options), options.output)


if __name__ == "__main__":
    main()
