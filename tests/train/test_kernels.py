"""Whole runs on the kernels that a CPU has where GPU kernels are asked for, which is the default."""

import re
from typing import Any

import pytest

from hstu.ops.kernels import OPERATORS
from tests.ops.backends import require_compiler
from tests.train.tiny import Train


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    require_compiler()


def network(backend: str, task: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"position_encoding": "absolute"}
    if task == "retrieval":
        changes = {"position_encoding": "relative_bias", "max_attention_span": 6, "min_full_attention_tokens": 2}
    return {"kernel_backend": backend, "hidden_dropout": 0.2, **changes}


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_they_train_as_pytorch_does_and_repeat_their_bits(train: Train, task: str) -> None:
    runs = [train(task, network=network(backend, task)) for backend in ("cutlass", "triton", "pytorch")]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses == pytest.approx(runs[2].losses, rel=1e-4)


def test_the_log_names_the_kernels(train: Train) -> None:
    text = (train("retrieval", network=network("cutlass", "retrieval")).path / "log.txt").read_text()
    assert "kernel_backend 'cutlass' runs on GPUs; this CPU uses C++ kernels" in text
    lines = dict(re.findall(r"kernel (\w+): (.*)", text))
    assert tuple(lines) == OPERATORS
    assert lines["attention"] == "cpu" and lines["jagged_concat"] == "pytorch (cpu: no kernel)"
