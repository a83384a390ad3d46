import math
import mmap
import time
from collections.abc import Iterator

import pytest
import torch

from hstu.observe.throughput import ThroughputMeter, _measure, data_sheet_tflops, memory_bytes, peak_tflops


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
    twice_as_busy_together = meter.take(lambda counts: [2 * count for count in counts], num_ranks=2)
    assert twice_as_busy_together.samples_per_s == 3.0
    assert twice_as_busy_together.tokens_per_s == 20.0
    assert twice_as_busy_together.tflops == 2.0
    assert twice_as_busy_together.mfu == 0.5


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
    peak = peak_tflops(torch.device("cpu"), dtype)
    # Processor time of all threads: the wall clock of a loaded machine says nothing.
    assert (time.process_time() - begun) / torch.get_num_threads() < 1.0
    assert math.isfinite(peak.value)
    assert 1e-4 < peak.value < 100
    assert "measured" in peak.source
    assert "cpu" in peak.source


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_reaches_a_good_part_of_its_peak_and_no_more() -> None:
    device = torch.device("cuda")
    assert 0.4 < _measure(device, torch.bfloat16) / peak_tflops(device, torch.bfloat16).value < 1.05
