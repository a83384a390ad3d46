"""Batches of about equally many tokens on each rank train what one process trains on them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest

from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.loader import build_loader
from hstu.data.sampling.sampler import BatchPlan, SamplerPosition, TrainSampler, epoch_order
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.pipeline.pipelines import SequentialPipeline
from hstu.pipeline.step import TrainStep
from hstu.train.builder import build_model
from hstu.train.sources import StoreSource, open_source
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.train.tiny import OF_THE_ACTION, TinyOptions, tiny_config

STEPS = 12
USERS, ITEMS, ACTIONS, MAX_ITEMS, BATCH = 110, 37, 4, 48, 16
BUDGET = 160
RANKS = 3
BY_TOKENS = {"tokens_per_rank": BUDGET, "train_batch_size": BATCH}
CASES: dict[str, Any] = {
    "ranking": {"task": "ranking"},
    "ranking, balanced": {"task": "ranking", "trainer": {"enable_balanced_shuffler": True}},
    "ranking, tasks": {
        "task": "ranking",
        "dataset": {"max_sequence_length": MAX_ITEMS, "max_num_candidates": 2},
        "task_args": OF_THE_ACTION,
    },
    "in batch": {"task": "retrieval", "task_args": {"negatives": "in_batch"}},
    "shared": {
        "task": "retrieval",
        "task_args": {"negatives": "uniform", "num_negatives": 6, "shared_negatives": True},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size → rank → case → what the rank reports."""
    directory: Path = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(4)
    lengths = np.clip(np.rint(rng.lognormal(2.2, 0.8, USERS)), 4, MAX_ITEMS + 9).astype(int)
    items = [rng.integers(0, ITEMS, length).tolist() for length in lengths]
    store = write_small_store(
        directory / "store",
        items,
        actions=[[item % ACTIONS for item in row] for row in items],
        context={"town": (np.arange(USERS) % 3).tolist()},
        num_items=ITEMS,
        num_actions=ACTIONS,
    )
    common = {
        "store": str(store.path),
        "dataset": {"max_sequence_length": MAX_ITEMS},
        "network": {"num_layers": 1, "num_position_buckets": 128},
        "optimizer": {"optimizer_str": "sgd", "learning_rate": 0.05},
    }
    return {
        size: run_cases(
            Launch(size, timeout_s=150),
            {
                name: partial(
                    train,
                    output=str(directory / f"{size} {name}"),
                    as_ranks=RANKS if size == 1 else None,
                    **common | options | {"trainer": BY_TOKENS | (options.get("trainer", {}) if size > 1 else {})},
                )
                for name, options in CASES.items()
            },
        )
        for size in (1, RANKS)
    }


def train(
    mesh: Mesh, task: str, store: str, output: str, as_ranks: int | None = None, **options: Unpack[TinyOptions]
) -> dict[str, Any]:
    """The losses and positions.

    ``as_ranks``: train on the batches that so many ranks would share, each as one batch.
    """
    config = tiny_config(task, store, output, **options)
    seed_initial_weights(config.trainer.seed)
    source = open_source(config, mesh)
    assert isinstance(source, StoreSource)
    model, optimizers = build_model(config, source, mesh)
    pipeline = SequentialPipeline(TrainStep(model, optimizers, mesh))
    batches = source.train_batches(SamplerPosition()) if as_ranks is None else _joined(source, as_ranks)
    losses, positions = [], []
    model.train()
    for _ in range(STEPS):
        step = pipeline.progress(batches)
        losses.append(step.losses.tolist())
        assert step.batch.position is not None
        positions.append([step.batch.position.epoch, step.batch.position.consumed])
    return {"losses": losses, "positions": positions}


def _joined(source: StoreSource, num_ranks: int) -> Iterator[HSTUBatch]:
    trainer, samples = source._config.trainer, source._train_samples
    assert source._partition is not None
    first = TrainSampler(len(samples), BATCH, 0, num_ranks, trainer.seed, True, partition=source._partition)

    def plans() -> Iterator[BatchPlan]:
        for plan in first:
            ordinals = np.arange(plan.global_start, plan.position.consumed)
            order = epoch_order(len(samples), trainer.seed, plan.epoch, shuffle=True)
            yield BatchPlan(order(ordinals), ordinals, plan.epoch, plan.global_start, plan.position)

    return build_loader(source._collator(source.store, samples, num_ranks * BATCH), plans())


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process_on_the_same_global_batches(runs: Any, case: str) -> None:
    alone, shared = runs[1][0][case], runs[RANKS][0][case]
    assert shared["positions"] == alone["positions"]
    assert abs(alone["losses"][0][0] - alone["losses"][-1][0]) > 1e-3, "nothing was learnt"
    np.testing.assert_allclose(shared["losses"], alone["losses"], rtol=1e-6)
