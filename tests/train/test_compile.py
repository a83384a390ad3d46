"""NetworkArgs.compile: the same training, also where nothing can be compiled."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.data.store.sequence_store import SequenceStore
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import train_whole
from tests.train.tiny import Train


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
