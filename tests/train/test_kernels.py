"""Whole runs on the kernels that a CPU has where GPU kernels are asked for, which is the default.

From Trainer.train to a kernel, the functions and files of this package are few.
"""

import importlib
import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hstu
from hstu.data.store.sequence_store import SequenceStore
from hstu.ops.cpu import build
from hstu.ops.kernels import OPERATORS, Backend, Kernels, KernelShapes
from hstu.ops.select import resolve_kernels
from hstu.pipeline.finite import NonFiniteStep
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import train_whole
from tests.ops.backends import require_compiler
from tests.train.tiny import Train


def network(backend: str, task: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"position_encoding": "absolute"}
    if task == "retrieval":
        changes = {"position_encoding": "relative_bias", "max_attention_span": 6, "min_full_attention_tokens": 2}
    return {"kernel_backend": backend, "hidden_dropout": 0.2, **changes}


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_they_train_as_pytorch_does_and_repeat_their_bits(train: Train, task: str) -> None:
    require_compiler()
    runs = [train(task, network=network(backend, task)) for backend in ("cutlass", "triton", "pytorch")]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses == pytest.approx(runs[2].losses, rel=1e-4)


def test_the_log_names_the_kernels(train: Train) -> None:
    require_compiler()
    text = (train("retrieval", network=network("cutlass", "retrieval")).path / "log.txt").read_text()
    assert "kernel_backend 'cutlass' runs on GPUs; this CPU uses C++ kernels" in text
    lines = dict(re.findall(r"kernel (\w+): (.*)", text))
    assert tuple(lines) == OPERATORS
    assert lines["attention"] == "cpu" and lines["jagged_concat"] == "pytorch (cpu: no kernel)"


MOST_FUNCTIONS, MOST_FILES = 13, 8
"""Of the call stack, from Trainer.train to the function that calls a kernel."""
Record = Callable[[str], None]


def watch_cpp(patch: pytest.MonkeyPatch, record: Record) -> None:
    require_compiler()

    class Library:
        def __getattr__(self, function: str) -> Any:
            record(function)
            return getattr(build.library(), function)

    for module in ("attention", "norm_mul_dropout", "softmax_loss"):
        patch.setattr(f"hstu.ops.cpu.{module}.library", Library)


def watch_triton(patch: pytest.MonkeyPatch, record: Record) -> None:
    """Kernels do not run, and their results are undefined. In a run, a launcher is Triton's own function."""
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

    def launcher(kernel: Any, *_: object) -> Callable[..., None]:
        return lambda **_: record(kernel.fn.__name__)

    def select_kernels(requested: str, strict: bool, device: object, shapes: KernelShapes) -> Kernels:
        return resolve_kernels(Backend.TRITON, shapes)

    for module in ("attention", "linear", "norm", "rows", "softmax_loss"):
        used = vars(importlib.import_module(f"hstu.ops.triton.{module}"))
        for name in {"launcher", "row_launcher"} & used.keys():
            patch.setattr(f"hstu.ops.triton.{module}.{name}", launcher)
    patch.setattr("hstu.train.builder.select_kernels", select_kernels)


@pytest.mark.parametrize("pipeline", ["none", "native"])
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
@pytest.mark.parametrize(
    ("watch", "kernels"),
    [
        (watch_cpp, {"hstu_attention", "hstu_gate"}),
        (watch_triton, {"attention_forward", "attention_backward_keys", "linear_silu", "norm_mul_dropout_forward"}),
    ],
)
def test_a_kernel_is_few_calls_away_from_the_trainer(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[[pytest.MonkeyPatch, Record], None],
    kernels: set[str],
    task: str,
    pipeline: str,
) -> None:
    calls: dict[str, list[list[traceback.FrameSummary]]] = {}

    def record(kernel: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(hstu.__path__[0])]
        names = [frame.name for frame in stack]
        if "_train_loop" in names:  # else it is the check of the kernels
            calls.setdefault(kernel, []).append(stack[names.index("_train_loop") - 1 :])

    watch(monkeypatch, record)
    trainer = {"pipeline_type": pipeline, "max_train_iters": 1}
    with suppress(NonFiniteStep):
        train(task, trainer=trainer, network={"kernel_backend": "triton", "hidden_dropout": 0.2})
    assert kernels <= calls.keys()
    for kernel, stacks in calls.items():
        for stack in stacks:
            assert stack[0].name == "train"
            assert len(stack) <= MOST_FUNCTIONS, (kernel, stack)
            assert len({frame.filename for frame in stack}) <= MOST_FILES, (kernel, stack)


@pytest.mark.slow
def test_compiled_parts_train_what_the_others_do_on_two_ranks(store: SequenceStore, tmp_path: Path) -> None:
    cases = {
        str(compiled): partial(
            train_whole,
            task="ranking",
            store=str(store.path),
            output=str(tmp_path / str(compiled)),
            network={
                "compile": compiled,
                "item_embedding_dim": 8,
                "contextual_embedding_dim": 8,
                "max_attention_span": 5,
            },
            trainer={
                "train_batch_size": 8,
                "eval_batch_size": 8,
                "eval_at_end": True,
                "gradient_accumulation_steps": 2,
            },
        )
        for compiled in (False, True)
    }
    told = run_cases(Launch(2, timeout_s=200), cases)[0]
    eager, compiled = told["False"], told["True"]
    assert len(eager["losses"]) == 4 and compiled["losses"].keys() == eager["losses"].keys()
    np.testing.assert_allclose(list(compiled["losses"].values()), list(eager["losses"].values()), rtol=1e-5)
    for part in ("tables", "dense"):
        for name, values in eager[part].items():
            np.testing.assert_allclose(compiled[part][name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    log = (tmp_path / "True" / "run" / "log.txt").read_text()
    parts = [f"encoder.inputs.projections.{role}" for role in ("item", "action", "contextual")]
    parts += ["head", "loss"]
    assert f"compiled at first use: {', '.join(parts)}" in log


def test_without_a_compiler_the_run_goes_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, warnings_of_hstu: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmany lines about it")

    monkeypatch.setattr("torch.compile", no_compiler)
    compiled = train("ranking", network={"compile": True})
    assert "NetworkArgs.compile: nothing is compiled, RuntimeError: no C++ compiler" in warnings_of_hstu.text
    assert compiled.losses == train("ranking").losses


def test_a_model_of_nothing_but_kernels_says_so(
    train: Train, monkeypatch: pytest.MonkeyPatch, warnings_of_hstu: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hstu.train.builder.why_not", lambda _: None)
    train("retrieval", network={"compile": True}, trainer={"max_train_iters": 1})
    assert "compiled at first use: nothing, all is in kernels" in warnings_of_hstu.text
