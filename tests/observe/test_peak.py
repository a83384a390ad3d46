from __future__ import annotations

import math
import time

import pytest
import torch

from hstu.observe.peak import data_sheet_tflops, peak_tflops


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


def test_a_rate_that_is_not_known_is_not_guessed() -> None:
    assert data_sheet_tflops("NVIDIA B200", torch.float32) is None
    assert data_sheet_tflops("NVIDIA H100 PCIe", torch.float64) is None


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
    from hstu.observe.peak import _measure

    device = torch.device("cuda")
    assert 0.4 < _measure(device, torch.bfloat16) / peak_tflops(device, torch.bfloat16).value < 1.05
