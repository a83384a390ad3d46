import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from hstu.observe.throughput import Profiler


def run(profiler: Profiler, begin: int, end: int) -> None:
    """Iterations that each multiply matrices of their own size, so that a trace tells which were recorded."""
    with profiler:
        for iteration in range(begin, end):
            profiler.step(iteration)
            torch.mm(torch.ones(iteration, 3), torch.ones(3, 2))


def multiplications(trace: Path) -> int:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def test_exactly_the_window_is_traced(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 3, 6)
    run(profiler, 1, 10)
    assert profiler.trace_file.name == "trace-rank0.json.gz"
    assert multiplications(profiler.trace_file) == 3


def test_a_run_that_ends_within_the_window_writes_what_it_has(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 3, 100, rank=1)
    run(profiler, 1, 5)
    assert multiplications(tmp_path / "trace-rank1.json.gz") == 2


def test_a_run_resumed_within_the_window_traces_the_rest_of_it(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 3, 6)
    run(profiler, 5, 10)
    assert multiplications(profiler.trace_file) == 1


def test_a_window_that_was_never_reached_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hstu"):
        run(Profiler(tmp_path, 50, 60), 1, 5)
    assert "outside of [50, 60)" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_kernels_are_traced_too(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 1, 2)
    with profiler:
        for iteration in range(3):
            profiler.step(iteration)
            torch.mm(torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda"))
    with gzip.open(profiler.trace_file) as file:
        categories = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "kernel" in categories
