"""The GPU benchmark's command line, shapes and FLOPs; it measures on a GPU alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench.attention_gpu import parse, shapes_of

ROOT = Path(__file__).parents[2]


def test_by_default_the_shapes_are_the_published_ones() -> None:
    shapes = shapes_of(parse([]))
    assert [shape.length for shape in shapes] == [512, 1024, 2048, 4096, 8192, 16384]
    assert all((s.batch_size, s.heads, s.head_dim, s.hidden) == (32, 4, 256, 1024) for s in shapes)


def test_a_shape_lays_out_its_sequences_and_counts_its_flops() -> None:
    (shape,) = shapes_of(
        parse(["--length", "6", "--batch-size", "2", "--heads", "3", "--head-dim", "5", "--hidden", "7"])
    )
    layout = shape.layout(torch.device("cpu"))
    assert layout.seqlens.tolist() == [6, 6] and layout.num_tokens == shape.tokens == 12
    products = 4 * 3 * 6 * 6 * 5  # two products of T² d multiply-adds a head
    assert shape.attention_flops == 2 * products // 2
    assert shape.linear_flops == 2 * 12 * 7 * (4 * 15 + 15)


def test_an_unknown_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--backend", "fast"])
    assert "fast" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run_instead() -> None:
    script = "scripts/bench/attention_gpu.py"
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode and "attention_cpu.py" in done.stderr
