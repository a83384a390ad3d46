"""A loss that is not finite, where the host learns of it one step late as on a GPU: on a CPU, to compare both ways."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hstu.data.store.sequence_store import SequenceStore
from hstu.model.stack import ModelOutput
from hstu.observe.records import read_metrics
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import build, tiny_config

STEPS, BAD_STEP = 5, 3


def lose(output: ModelOutput) -> None:
    output.loss_sum = output.loss_sum * float("nan")


def overflow_gradient(output: ModelOutput) -> None:
    output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))


def spoil(trainer: Trainer, deed: Callable[[ModelOutput], None], bad_step: int = BAD_STEP) -> None:
    """Do ``deed`` to the output of the model in one step, or in its first micro-batch."""
    forwards, micro_batches = 0, trainer.args.gradient_accumulation_steps

    def hook(_module: Any, _inputs: Any, output: ModelOutput) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == (bad_step - 1) * micro_batches + 1:
            deed(output)

    unwrap_dense(trainer.state.model).register_forward_hook(hook)


def steps(mesh: Mesh, store: SequenceStore, output: Path, *, deferred: bool, bad: Any, **options: Any) -> list[Any]:
    """Digests of all weights and states at the start and after each step; of an error, its text and the digest then."""
    trainer = build(tiny_config("retrieval", store, output, **options), mesh)
    trainer.pipeline.step.check.deferred = deferred
    if bad is not None:
        spoil(trainer, bad)
    batches = trainer.source.train_batches(trainer.state.position)
    told: list[Any] = [digest(trainer.state, mesh)]
    users = []
    try:
        for iteration in range(1, STEPS + 1):
            mesh.heartbeat.iteration = iteration
            result = trainer.pipeline.progress(batches)
            users.append(result.batch.user_ids.tolist()[: result.batch.real_batch_size])
            told.append(digest(trainer.state, mesh))
    except NonFiniteStep as error:
        assert error.iteration == BAD_STEP
        told += [str(error), digest(trainer.state, mesh)]
        if deferred:
            assert f"users in rows {', '.join(map(str, users[BAD_STEP - 1][:5]))}" in str(error)
    trainer.run_directory.close()
    return told


SHARDED = ("item_id", "town")
CASES: dict[str, dict[str, Any]] = {
    "none, sgd with momentum": {"optimizer": {"optimizer_str": "sgd", "momentum": 0.9}},
    "native, rowwise_adagrad, clipped": {
        "optimizer": {"optimizer_str": "rowwise_adagrad"},
        "trainer": {"max_grad_norm": 0.05},
    },
    "prefetch, adagrad, accumulated": {
        "optimizer": {"optimizer_str": "adagrad"},
        "trainer": {"gradient_accumulation_steps": 2},
        "sharded": (),
    },
    "native, adam, averaged, decayed": {"optimizer": {"optimizer_str": "adam", "ema_decay": 0.5, "weight_decay": 0.1}},
    "none, sgd, fixed loss scale": {"optimizer": {"optimizer_str": "sgd"}, "precision": {"loss_scale": 1024.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_moves_no_weight_and_no_state(mesh: Mesh, store: SequenceStore, tmp_path: Path, case: str) -> None:
    options: dict[str, Any] = {"sharded": SHARDED, **CASES[case]}
    options["trainer"] = {"pipeline_type": case.split(",")[0], **options.get("trainer", {})}
    options["optimizer"] = {"learning_rate": 0.1, **options["optimizer"]}
    good = steps(mesh, store, tmp_path / "good", deferred=False, bad=None, **options)
    assert len({str(weights) for weights in good}) == STEPS + 1
    assert steps(mesh, store, tmp_path / "late", deferred=True, bad=None, **options) == good
    for what, bad in (("loss", lose), ("gradient", overflow_gradient)):
        for deferred in (False, True):
            place = tmp_path / f"{what} {deferred}"
            *before, error, after = steps(mesh, store, place, deferred=deferred, bad=bad, **options)
            unmoved = good[BAD_STEP - 1]
            assert before == good[:BAD_STEP] + [unmoved] * deferred and after == unmoved
            number = "nan" if what == "loss" else "nan or inf"
            assert f"the {what} is not finite at iteration {BAD_STEP}: {number} on rank 0, whose batch has" in error


COMES_NEXT: dict[str, dict[str, Any]] = {
    "the next step": {},
    "a log line": {"log_interval": 3},
    "an evaluation": {"eval_interval": 3},
    "a checkpoint": {"ckpt_save_interval": 3},
    "the end": {"max_train_iters": 3, "log_interval": 2},
}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("case", COMES_NEXT)
def test_nothing_of_a_bad_step_is_logged_evaluated_or_saved(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, case: str, deferred: bool
) -> None:
    options = {"max_train_iters": 8, "log_interval": 100, "eval_interval": 100, "ckpt_save_interval": 100}
    trainer = build(tiny_config("ranking", store, tmp_path, trainer=options | COMES_NEXT[case]), mesh)
    trainer.pipeline.step.check.deferred = deferred
    spoil(trainer, lose)
    with pytest.raises(NonFiniteStep, match=re.escape("the loss is not finite at iteration 3: nan on rank 0")):
        trainer.train()
    summary = json.loads((trainer.run_directory.path / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("failed", 2)
    records = trainer.run_directory.path / "metrics.jsonl"
    assert [record["iter"] for record in read_metrics(records)] == ([2] if case == "the end" else [])
    assert not list((tmp_path / "checkpoints").glob("iteration_*"))
