from __future__ import annotations

import math

import pytest
import torch

from hstu.observe.throughput import ThroughputMeter, memory_bytes


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_counts_over_the_time_between_two_takes() -> None:
    clock = Clock()
    meter = ThroughputMeter(peak_tflops=2.0, clock=clock)
    for _ in range(4):
        clock.now += 0.5
        meter.add(samples=128, tokens=1000, flops=0.25e12)
    speed = meter.take()
    assert (speed.steps, speed.step_s) == (4, 0.5)
    assert (speed.samples_per_s, speed.tokens_per_s) == (256, 2000)
    assert (speed.tflops, speed.mfu) == (0.5, 0.25)

    clock.now += 1.0
    meter.add(samples=10, tokens=20)
    assert meter.take().samples_per_s == 10  # nothing of the interval before is left


def test_evaluation_is_left_out_and_waiting_for_data_is_not() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    clock.now += 3.0
    meter.add(samples=8, tokens=8)
    with meter.waiting():
        clock.now += 1.0
    with meter.paused():
        clock.now += 60.0
    speed = meter.take()
    assert speed.samples_per_s == 2.0
    assert speed.data_wait == 0.25


def test_a_timed_iterator_gives_the_same_batches_and_counts_the_wait() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    clock.now += 1000.0  # building the model; training begins when batches are asked for

    def slow_loader():
        for batch in "abc":
            clock.now += 2.0
            yield batch

    seen = []
    for batch in meter.timed(slow_loader()):
        seen.append(batch)
        clock.now += 2.0
        meter.add(samples=1, tokens=1)
    assert seen == ["a", "b", "c"]
    assert meter.take().data_wait == pytest.approx(0.5)


def test_over_ranks_counts_add_up_while_tflops_and_waiting_are_the_mean_ranks() -> None:
    clock = Clock()
    meter = ThroughputMeter(peak_tflops=4.0, clock=clock)
    clock.now += 2.0
    with meter.waiting():
        clock.now += 2.0
    meter.add(samples=6, tokens=40, flops=8e12)
    twice_as_busy_together = meter.take(lambda counts: [2 * count for count in counts], num_ranks=2)
    assert twice_as_busy_together.samples_per_s == 3.0
    assert twice_as_busy_together.tokens_per_s == 20.0
    assert twice_as_busy_together.tflops == 2.0
    assert twice_as_busy_together.mfu == 0.5
    assert twice_as_busy_together.data_wait == 0.5


def test_what_is_unknown_is_nan_not_zero() -> None:
    meter = ThroughputMeter()
    speed = meter.take()
    assert math.isnan(speed.mfu)
    assert math.isnan(speed.step_s)


def test_memory_on_cpu_grows_with_what_is_held() -> None:
    before = memory_bytes(torch.device("cpu"))
    held = torch.ones(64 * 2**20 // 4)
    assert memory_bytes(torch.device("cpu")) - before > 0.8 * held.numel() * 4
