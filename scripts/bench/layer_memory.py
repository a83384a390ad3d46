"""What a layer keeps for backward, measured beside the formula, and what recomputing costs in time on a CPU.

    python scripts/bench/layer_memory.py [--rounds 7] [--output docs/benchmarks/layer/memory.json]

Prints one JSON object: for each option of NetworkArgs, compute type and kernels the bytes a token and layer that are
alive after the forward of a stack and were not before (the allocator's count), those of the formula
(hstu.train.estimate.activations.kept_by_layer); the most bytes a token that are alive at once during a step of the
stack; and milliseconds of forward and backward a layer, the options taking turns in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from attention_cpu import make_layout

from hstu.config.args import NetworkArgs
from hstu.model.stack import HSTUStack
from hstu.ops.backends import Backend, select_backend
from hstu.ops.layout import JaggedLayout
from hstu.train.estimate.activations import kept_by_layer

NETWORK = NetworkArgs(
    num_layers=4, hidden_size=256, num_attention_heads=4, kv_channels=64, position_encoding="relative_bias"
)
SEQUENCES, LONGEST = 32, 200
OPTIONS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "recompute_input_layernorm": {"recompute_input_layernorm": True},
    "recompute_input_silu": {"recompute_input_silu": True},
    "both": {"recompute_input_layernorm": True, "recompute_input_silu": True},
    "recompute_layer": {"recompute_layer": True},
}
TYPES = {"float32": 4, "bfloat16": 2}
"""Compute type and its bytes."""


@dataclasses.dataclass
class Case:
    """A stack of layers with an option, and its input."""

    network: NetworkArgs
    stack: HSTUStack
    dtype: str
    layout: JaggedLayout
    x: Tensor

    def forward(self) -> Tensor:
        """Of the whole stack."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            out: Tensor = self.stack(self.x, self.layout)
        return out

    def step(self) -> None:
        """Forward and backward."""
        self.forward().sum().backward()

    def memory(self) -> dict[str, float]:
        """Bytes a token by the allocator's count: alive after the forward a layer, and most of a whole step.

        What is alive includes the output of the last layer and not the input of the first, which is as large.
        """
        forward = _allocations(self.forward)
        step = np.cumsum(_allocations(self.step))
        tokens = len(self.x)
        return {
            "kept_a_layer": round(sum(forward) / tokens / self.network.num_layers, 2),
            "most_of_a_step": round(int(step.max()) / tokens),
        }


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every allocation during ``run``, negative where memory is freed; what it returns stays alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    return changes


def make_cases(backend: Backend, dtype: str) -> dict[str, Case]:
    """One for each option, with the same weights."""
    rng = np.random.default_rng(0)
    layout = make_layout(rng.integers(LONGEST // 4, LONGEST + 1, SEQUENCES).astype(np.int64), rng)
    cases = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        network = dataclasses.replace(NETWORK, **options)
        x = torch.randn(layout.num_tokens, network.hidden_size, requires_grad=True)
        cases[name] = Case(network, HSTUStack(network, LONGEST, backend), dtype, layout, x)
    return cases


def measure(backend: Backend, dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each option."""
    cases = make_cases(backend, dtype)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-2, rounds):
        for name, case in cases.items():
            begun = time.perf_counter()
            case.step()
            if number >= 0:
                times[name].append((time.perf_counter() - begun) * 1e3 / case.network.num_layers)
    return {
        name: {
            **case.memory(),
            "formula": kept_by_layer(case.network, len(case.x), 1, TYPES[dtype], 4) / len(case.x),
            "ms_a_layer_median": round(statistics.median(times[name]), 2),
            "ms_a_layer_fastest": round(min(times[name]), 2),
        }
        for name, case in cases.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    backends = dict.fromkeys([select_backend("cutlass", False, torch.device("cpu")), Backend.PYTORCH])
    report = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": len(next(iter(make_cases(Backend.PYTORCH, "float32").values())).x),
        "hidden_size": NETWORK.hidden_size,
        "heads": [NETWORK.num_attention_heads, NETWORK.kv_channels],
        "dropout": NETWORK.hidden_dropout,
        "kernels": {
            backend.value: {dtype: measure(backend, dtype, options.rounds) for dtype in TYPES} for backend in backends
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
