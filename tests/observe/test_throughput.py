import gzip
import json
import logging
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config.args import NetworkArgs, TrainerArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.roles import FeatureRoles
from hstu.observe.throughput import (
    FlopCounter,
    Profiler,
    ThroughputMeter,
    _measure,
    data_sheet_tflops,
    memory_bytes,
    peak_tflops,
    rank_times,
)
from hstu.ops.costs import sequence_flops
from hstu.parallel.own_time import OwnTime
from tests.helpers import make_batch
from tests.train.tiny import NETWORK


@dataclass
class Clock:
    """A clock that moves when told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_counts_over_the_time_between_two_takes() -> None:
    clock = Clock()
    meter = ThroughputMeter(peak_tflops=2.0, clock=clock)
    for _ in range(4):
        clock.now += 0.5
        meter.add(samples=128, tokens=1000, flops=0.25e12)
    speed = meter.take()
    assert speed.step_s == 0.5
    assert (speed.samples_per_s, speed.tokens_per_s) == (256, 2000)
    assert (speed.tflops, speed.mfu) == (0.5, 0.25)

    clock.now += 1.0
    meter.add(samples=10, tokens=20)
    assert meter.take().samples_per_s == 10  # nothing of the interval before is left


def test_the_wait_for_batches_counts_and_evaluation_does_not() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    clock.now += 1000.0  # building the model; training begins when batches are asked for

    def slow_loader() -> Iterator[str]:
        for batch in "abc":
            clock.now += 2.0
            yield batch

    seen = []
    for batch in meter.timed(slow_loader()):
        seen.append(batch)
        clock.now += 2.0
        meter.add(samples=4, tokens=8)
        with meter.paused():
            clock.now += 60.0
    assert seen == ["a", "b", "c"]
    speed = meter.take()
    assert speed.data_wait == pytest.approx(0.5) and speed.samples_per_s == 1.0


def test_over_ranks_counts_add_up_while_tflops_are_the_mean_ranks() -> None:
    clock = Clock()
    meter = ThroughputMeter(peak_tflops=4.0, clock=clock)
    clock.now += 4.0
    meter.add(samples=6, tokens=40, flops=8e12)
    twice_as_busy_together = meter.take(gather=lambda own: [own, own])
    assert twice_as_busy_together.samples_per_s == 3.0
    assert twice_as_busy_together.tokens_per_s == 20.0
    assert twice_as_busy_together.tflops == 2.0
    assert twice_as_busy_together.mfu == 0.5


def test_the_slowest_rank_spends_the_most_on_its_own() -> None:
    times = rank_times(np.array([[1.0, 0.0], [0.9, 0.1], [1.0, 0.25]]), step_s=2.0)
    assert times["slowest_rank"] == 2 and times["slowest_excess"] == pytest.approx(0.25)
    assert times["mean_collective_s"] == pytest.approx(2 - 3.25 / 3)


def test_own_time_leaves_out_waits_and_steps_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cpu, own_time = Clock(), torch.device("cpu"), OwnTime()
    monkeypatch.setattr(time, "perf_counter", clock)

    def work(seconds: float) -> None:
        clock.now += seconds

    own_time.start(cpu)
    work(7.0)  # and then it fails
    weight = torch.ones(1, requires_grad=True)
    for _ in range(2):
        own_time.start(cpu)
        work(1.0)
        with own_time.paused(), own_time.paused():
            work(10.0)
        loss = (2 * weight).sum()
        own_time.stop_after_backward(loss)
        weight.register_hook(lambda _: work(0.5))
        loss.backward()
        work(10.0)
    with own_time.paused():  # outside of a step, as in an evaluation
        work(10.0)
    assert own_time.pop_s() == pytest.approx(1.0 + 0.5 + 1.0 + 2 * 0.5)
    assert own_time.pop_s() == 0.0


def test_memory_on_cpu_grows_with_what_is_held() -> None:
    before = memory_bytes(torch.device("cpu"))
    with mmap.mmap(-1, 64 << 20) as held:  # not by malloc, which may have freed memory left
        held.write(b"1" * len(held))
        assert memory_bytes(torch.device("cpu")) - before > 0.8 * len(held)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
    ],
)
def test_known_gpus_have_their_data_sheet_rate(name: str, tflops: float) -> None:
    assert data_sheet_tflops(name, torch.bfloat16) == tflops
    assert data_sheet_tflops(name, torch.float16) == tflops


def test_float32_depends_on_whether_tensor_cores_may_be_used() -> None:
    assert data_sheet_tflops("NVIDIA H100 80GB HBM3", torch.float32) == 67
    assert data_sheet_tflops("NVIDIA H100 80GB HBM3", torch.float32, tf32=True) == 494.5
    assert data_sheet_tflops("Tesla V100-SXM2-32GB", torch.float32, tf32=True) == 15.7  # has no TF32


@pytest.mark.parametrize("name", ["NVIDIA X9000", "NVIDIA A10G", "NVIDIA GB200", "NVIDIA H200 NVL", "NVIDIA L40"])
def test_an_unknown_gpu_is_not_taken_for_a_similar_one(name: str) -> None:
    assert data_sheet_tflops(name, torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_in_a_moment(dtype: torch.dtype) -> None:
    begun = time.process_time()
    peak, origin = peak_tflops(torch.device("cpu"), dtype)
    # Processor time of all threads: the wall clock of a loaded machine says nothing.
    assert (time.process_time() - begun) / torch.get_num_threads() < 1.0
    assert 1e-4 < peak < 100
    assert "measured" in origin
    assert "cpu" in origin


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_reaches_a_good_part_of_its_peak_and_no_more() -> None:
    device = torch.device("cuda")
    assert 0.4 < _measure(device, torch.bfloat16) / peak_tflops(device, torch.bfloat16)[0] < 1.05


# --- tokens and FLOPs of a batch --------------------------------------------------------------------------------------

WITH_ACTIONS = FeatureRoles("item", "action", ("town", "age"))


def counter(roles: FeatureRoles = WITH_ACTIONS, **options: Any) -> FlopCounter:
    return FlopCounter(NetworkArgs(**{**NETWORK, **options}), roles)


def batch(*items: list[int], candidates: list[int] | None = None) -> HSTUBatch:
    return make_batch(list(items), [[0] * len(row) for row in items], num_candidates=candidates)


@pytest.mark.parametrize(
    ("roles", "interleave", "tokens_per_item"),
    [(WITH_ACTIONS, True, 2), (WITH_ACTIONS, False, 1), (FeatureRoles("item", None, ("town", "age")), True, 1)],
)
def test_tokens_are_context_items_and_interleaved_actions(
    roles: FeatureRoles, interleave: bool, tokens_per_item: int
) -> None:
    counted, _ = counter(roles, interleave_actions=interleave).count(batch([1, 2, 3], [4]))
    assert counted == (2 + 3 * tokens_per_item) + (2 + 1 * tokens_per_item)


def test_layers_after_a_truncation_cost_as_much_as_shorter_sequences() -> None:
    def flops(layers: int, items: int, **options: Any) -> float:
        return counter(num_layers=layers, **options).count(batch([0] * items, candidates=[2]))[1]

    truncated = flops(3, 9, truncate_after_layer=1, truncate_to_items=4)
    assert truncated == flops(1, 9) + flops(2, 4 + 2)
    assert flops(3, 5, truncate_after_layer=1, truncate_to_items=4) == flops(3, 5), "a history that is short"


def test_padding_costs_nothing() -> None:
    assert counter().count(batch([1, 2, 3], [4], [], [])) == counter().count(batch([1, 2, 3], [4]))
    assert counter().count(batch([], [])) == (0, 0.0)


def test_candidates_and_their_actions_count_apart_from_history() -> None:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
    expected = sequence_flops(np.array([2 + 4 * 2]), np.array([3 * 2]), **shape)
    assert counter().count(batch([1, 2, 3, 4], candidates=[3]))[1] == expected


# --- profiles --------------------------------------------------------------------------------------------------------


def profiler_of(directory: Path, start: int, end: int, rank: int = 0) -> Profiler:
    window: Any = {"profile_step_start": start, "profile_step_end": end}
    args = TrainerArgs(train_batch_size=1, eval_batch_size=1, profile=True, **window)
    return Profiler(directory, args, rank)


def run_in(profiler: Profiler, begin: int, end: int) -> None:
    """Iterations that each multiply matrices of their own size, so that a trace tells which were recorded."""
    with profiler:
        for iteration in range(begin, end):
            profiler.step(iteration)
            torch.mm(torch.ones(iteration, 3), torch.ones(3, 2))


def multiplications(trace: Path) -> int:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


@pytest.mark.parametrize(
    ("window", "iterations", "rank", "traced"),
    [((3, 6), (1, 10), 0, 3), ((3, 100), (1, 5), 1, 2), ((3, 6), (5, 10), 0, 1)],
    ids=["exactly the window", "a run that ends in it", "a run resumed in it"],
)
def test_what_is_in_the_window_is_traced(
    window: tuple[int, int], iterations: tuple[int, int], rank: int, traced: int, tmp_path: Path
) -> None:
    run_in(profiler_of(tmp_path, *window, rank), *iterations)
    assert multiplications(tmp_path / f"trace-rank{rank}.json.gz") == traced


def test_a_window_that_was_never_reached_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hstu"):
        run_in(profiler_of(tmp_path, 50, 60), 1, 5)
    assert "outside of [50, 60)" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_kernels_are_traced_too(tmp_path: Path) -> None:
    profiler = profiler_of(tmp_path, 1, 2)
    with profiler:
        for iteration in range(3):
            profiler.step(iteration)
            torch.mm(torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda"))
    with gzip.open(profiler.trace_file) as file:
        categories = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "kernel" in categories
