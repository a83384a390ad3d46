"""A scaled loss trains what an unscaled one does, and a step that overflows on any rank leaves no trace on all.

Bit for bit, over groups of both kinds, in all pipelines, with tables that backward updates and tables that it does not.
The runs compute in float32, in which scaling by a power of two is exact.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Unpack

import pytest

from hstu.data.batches.batch import HSTUBatch
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.train.trainer import Trainer
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import (
    TinyOptions,
    build,
    in_forward,
    skip_measuring_the_peak,
    tables_with_dynamic,
    tiny_config,
    walks,
)

STEPS = 4
BAD_STEP = 2
"""The step whose gradients overflow, counted from 1."""

BATCH = {"train_batch_size": 4}
CASES: dict[str, Any] = {
    "none, momentum": {
        "task": "ranking",
        "sharded": [],
        "optimizer": {"optimizer_str": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        "trainer": {"pipeline_type": "none", **BATCH},
    },
    "native, clipped, accumulated": {
        "task": "ranking",
        "dynamic": True,
        "optimizer": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.1},
        "trainer": {
            "pipeline_type": "native",
            "max_grad_norm": 0.05,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 2,
        },
    },
    "prefetch, adam, averaged": {
        "task": "retrieval",
        "sharded": ["item_id", "town", "action"],
        "optimizer": {"optimizer_str": "adam", "learning_rate": 0.01, "ema_decay": 0.5},
        "trainer": {"pipeline_type": "prefetch", **BATCH},
    },
}
WAYS: dict[str, Any] = {
    "unscaled": {},
    "fixed": {"precision": {"loss_scale": 1024.0}},
    "without the batch": {"leave_out": True},
    "overflow": {"precision": {"loss_scale": "dynamic", "growth_interval": 2}, "overflow": math.inf},
}
LAUNCHES = {"2 ranks": Launch(2, 200), "2 × 2 ranks": Launch(4, 200, tp=2)}


@pytest.fixture(scope="module", params=["2 ranks", pytest.param("2 × 2 ranks", marks=pytest.mark.slow)])
def runs(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per rank: "case, way" → what ``train`` returns."""
    place = tmp_path_factory.mktemp("scaling")
    write_small_store(place / "store", **walks(40))
    cases = {
        f"{name}, {way}": partial(
            train, store=str(place / "store"), output=f"{place}/{name}/{way}", **options, **CASES[name]
        )
        for name in CASES
        for way, options in WAYS.items()
    }
    return run_cases(LAUNCHES[request.param], cases)


def train(
    mesh: Mesh,
    task: str,
    store: str,
    output: str,
    *,
    leave_out: bool = False,
    overflow: float = 0.0,
    dynamic: bool = False,
    **options: Unpack[TinyOptions],
) -> dict[str, Any]:
    """STEPS steps. ``leave_out``: without the batch of BAD_STEP. ``overflow``: factor of its gradient on the last rank.

    ``dynamic``: the items' table is dynamic. Its rows are not compared, but the weights that are trained on them.
    """
    skip_measuring_the_peak()
    if dynamic:
        options["tables"] = tables_with_dynamic(SequenceStore.open(store), 30)
    trainer = build(tiny_config(task, store, output, **options), mesh)
    if overflow and mesh.rank == mesh.world_size - 1:
        in_forward(trainer, BAD_STEP, lambda output: output.loss_sum.register_hook(lambda grad: grad * overflow))
    batches = _batches(trainer, leave_out)
    told: dict[str, Any] = {"weights": [digest(trainer.state, mesh)], "scales": [], "losses": []}
    for number in range(1, STEPS + 1 - leave_out):
        trainer.state.iteration = mesh.heartbeat.iteration = number
        result = trainer.pipeline.progress(batches)
        told["losses"].append(float(result.loss))
        told["weights"].append(digest(trainer.state, mesh))
        scale = trainer.pipeline.step.loss_scale
        told["scales"].append(gather_objects(None if scale is None else scale.value, mesh.world_group))
    told["table steps"] = trainer.state.optimizers.tables.steps
    trainer.run_directory.close()
    return told


def _batches(trainer: Trainer, leave_out: bool) -> Iterator[HSTUBatch]:
    for number, batch in enumerate(trainer.source.train_batches(trainer.state.position), 1):
        if not (leave_out and number == BAD_STEP):
            yield batch


@pytest.mark.parametrize("case", CASES)
def test_a_fixed_scale_changes_no_bit(runs: Any, case: str) -> None:
    for rank in runs:
        unscaled, fixed = rank[f"{case}, unscaled"], rank[f"{case}, fixed"]
        assert len({str(weights) for weights in unscaled["weights"]}) == STEPS + 1
        assert fixed["weights"] == unscaled["weights"] and fixed["losses"] == unscaled["losses"]
        assert fixed["scales"] == [[1024.0] * len(runs)] * STEPS


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_overflows_on_one_rank_changes_nothing_on_any(runs: Any, case: str) -> None:
    for rank in runs:
        told, expected = rank[f"{case}, overflow"], rank[f"{case}, without the batch"]
        before, after = told["weights"][BAD_STEP - 1 : BAD_STEP + 1]
        assert after == before
        assert told["weights"][:BAD_STEP] + told["weights"][BAD_STEP + 1 :] == expected["weights"]
        assert told["table steps"] == STEPS - 1
        unscaled = rank[f"{case}, unscaled"]["losses"]
        assert told["losses"][:BAD_STEP] == unscaled[:BAD_STEP], "the loss of a skipped step is that of its batch"
        # growth_interval is 2: the step before the overflow does not count any more after it
        assert told["scales"] == [[value] * len(runs) for value in (65536.0, 32768.0, 32768.0, 65536.0)]
