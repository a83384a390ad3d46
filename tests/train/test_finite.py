"""A loss that is no number, looked at after backward as on a GPU: here on a CPU, where both ways can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hstu.data.store import SequenceStore
from hstu.model.outputs import ModelOutput
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import build, tiny_config

STEPS = 4


def steps(mesh: Mesh, store: SequenceStore, output: Path, *, late: bool, bad_step: int, **options: Any) -> list[Any]:
    """The weights at the start and after each step; ends with the error if there is one, and the weights then."""
    trainer = build(tiny_config("retrieval", store, output, **options), mesh)
    trainer.pipeline.check.after_backward = late
    forwards = 0

    def hook(_module: Any, _inputs: Any, output: ModelOutput) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == bad_step:
            output.loss_sum = output.loss_sum * float("nan")

    trainer.state.model.dense.register_forward_hook(hook)
    batches = trainer.source.train_batches(trainer.state.position)
    told: list[Any] = [digest(trainer.state, mesh)]
    try:
        for _ in range(STEPS):
            trainer.pipeline.progress(batches)
            told.append(digest(trainer.state, mesh))
    except NonFiniteStep as error:
        told += [str(error), digest(trainer.state, mesh)]
    trainer.run_directory.close()
    return told


CASES = [("none", "sgd"), ("native", "rowwise_adagrad"), ("prefetch", "adagrad")]


@pytest.mark.parametrize(("pipeline", "optimizer"), CASES)
def test_tables_that_backward_updates_do_not_see_a_step_without_a_number(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, pipeline: str, optimizer: str
) -> None:
    options = {
        "trainer": {"pipeline_type": pipeline},
        "optimizer": {"optimizer_str": optimizer, "learning_rate": 0.1},
        "sharded": ("item_id", "town"),
    }
    good = steps(mesh, store, tmp_path / "good", late=False, bad_step=0, **options)
    assert len({str(weights) for weights in good}) == STEPS + 1
    assert steps(mesh, store, tmp_path / "masked", late=True, bad_step=0, **options) == good
    for late in (False, True):
        *before, error, after = steps(mesh, store, tmp_path / f"bad {late}", late=late, bad_step=3, **options)
        assert before == good[:3] and after == good[2]
        assert "nan on rank 0, whose batch has the users in rows" in error
