"""A loss that is not finite, also where the host learns of it one step late as on a GPU; and losses in float16.

Float16 is close to float32, also with gradients that would vanish unscaled. Runs that overflow for good end.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.model.stack import ModelOutput
from hstu.observe.records import read_metrics
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import Train, build, in_forward, tiny_config

STEPS, BAD_STEP = 5, 3


def lose(output: ModelOutput) -> None:
    output.loss_sum = output.loss_sum * float("nan")


def overflow_gradient(output: ModelOutput) -> None:
    output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))


def steps(mesh: Mesh, store: SequenceStore, output: Path, *, deferred: bool, bad: Any, **options: Any) -> list[Any]:
    """Digests of all weights and states at the start and after each step; of an error, its text and the digest then."""
    trainer = build(tiny_config("retrieval", store, output, **options), mesh)
    trainer.pipeline.step.check.deferred = deferred
    if bad is not None:
        in_forward(trainer, BAD_STEP, bad)
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
    in_forward(trainer, BAD_STEP, lose)
    with pytest.raises(NonFiniteStep, match=re.escape("the loss is not finite at iteration 3: nan on rank 0")):
        trainer.train()
    summary = json.loads((trainer.run_directory.path / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("failed", 2)
    records = trainer.run_directory.path / "metrics.jsonl"
    assert [record["iter"] for record in read_metrics(records)] == ([2] if case == "the end" else [])
    assert not list((tmp_path / "checkpoints").glob("iteration_*"))


# --- float16 ---

FLOAT16 = {"dtype_str": "float16"}
OPTIMIZER = {"optimizer_str": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_float16_learns_what_float32_learns(train: Train, task: str) -> None:
    half = train(task, network=FLOAT16, optimizer=OPTIMIZER, precision={"loss_scale": 1024.0})
    exact = train(task, optimizer=OPTIMIZER)
    assert half.losses == pytest.approx(exact.losses, rel=2e-3) and half.losses != exact.losses


def test_float16_finds_its_scale_by_itself(train: Train, warnings_of_hstu: pytest.LogCaptureFixture) -> None:
    finished = train("retrieval", network=FLOAT16, trainer={"max_train_iters": 8})  # whose losses are large
    records = [record for record in finished.records if record["kind"] == "train"]
    skipped = [record["skipped_steps"] for record in records]
    assert skipped[0] == 1 and skipped[-1] == 0
    assert [record["loss_scale"] for record in records] == [65536 / 2 ** sum(skipped[: n + 1]) for n in range(8)]
    assert "gradients overflow at iteration 1: skipped, loss scale 65536 → 32768" in warnings_of_hstu.text
    assert "  1 skipped" in warnings_of_hstu.text and "float16 on a CPU" in warnings_of_hstu.text


def test_other_types_have_no_scale(train: Train) -> None:
    assert not any("loss_scale" in record for record in train("ranking", trainer={"max_train_iters": 1}).records)


TINY_LOSS = 2.0**-20


def gradients(mesh: Mesh, store: SequenceStore, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What the optimizers get in the first step for rows and dense weights, if the loss is TINY_LOSS times itself."""
    trainer = build(tiny_config("ranking", store, output, optimizer=OPTIMIZER, **options), mesh)
    on_loss(trainer, lambda output: setattr(output, "loss_sum", output.loss_sum * TINY_LOSS))
    found = {}

    def keep(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        found["rows"] = torch.cat([gradient.flatten() for gradient in gradients]) / TINY_LOSS
        return gradients

    trainer.pipeline.step.check.mask = keep  # type: ignore[method-assign]
    trainer.pipeline.progress(trainer.source.train_batches(trainer.state.position))
    weights = trainer.state.optimizers.dense.parameters.values()
    dense = [weight.grad.to_dense().flatten() for weight in weights if weight.grad is not None]
    found["weights"] = torch.cat(dense) / TINY_LOSS
    trainer.run_directory.close()
    return found


def on_loss(trainer: Trainer, deed: Callable[[ModelOutput], Any]) -> None:
    unwrap_dense(trainer.state.model).register_forward_hook(lambda _module, _inputs, output: deed(output) and None)


def test_gradients_that_float16_has_no_numbers_for_survive_scaled(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    exact = gradients(mesh, store, tmp_path / "exact")
    scaled = gradients(mesh, store, tmp_path / "scaled", network=FLOAT16)
    unscaled = gradients(mesh, store, tmp_path / "unscaled", network=FLOAT16, precision={"loss_scale": 1.0})
    for what, right in exact.items():
        assert (scaled[what] - right).norm() < 0.01 * right.norm(), what
        assert (unscaled[what] - right).norm() > 0.3 * right.norm(), what


@pytest.mark.parametrize(
    ("scale", "steps", "advice"),
    [("dynamic", 16, "The loss scale is 1. Lower"), (1024.0, 0, "The loss scale is 1024. Lower")],
)
def test_a_run_that_overflows_whatever_the_scale_ends(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, scale: Any, steps: int, advice: str
) -> None:
    trainer = build(tiny_config("ranking", store, tmp_path, precision={"loss_scale": scale}), mesh)
    on_loss(trainer, lambda output: output.loss_sum.register_hook(lambda gradient: gradient * math.inf))
    batches = trainer.source.train_batches(trainer.state.position)
    before = digest(trainer.state, mesh)
    for _ in range(steps):
        trainer.pipeline.progress(batches)
    with pytest.raises(NonFiniteStep, match="the gradient is not finite") as caught:
        trainer.pipeline.progress(batches)
    assert advice in str(caught.value)
    assert digest(trainer.state, mesh) == before
    trainer.run_directory.close()
