"""Float16 is close to float32, also with gradients that would vanish unscaled; and runs that overflow for good end."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.model.stack import ModelOutput
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import Train, build, tiny_config

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
