"""Batches of random data, and the classes of a ranking head for the actions of any data."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import (
    BenchmarkDatasetArgs,
    EmbeddingArgs,
    FeatureArgs,
    RandomDistribution,
    RankingArgs,
)
from hstu.config.run_config import RunConfig
from hstu.data.sampling.sampler import SamplerPosition
from hstu.parallel.mesh import Mesh
from hstu.train.batch_source import label_offset
from hstu.train.sources import RandomSource, open_source
from tests.train.tiny import ids, run, run_config

FIRST = SamplerPosition()


def random_config(task: str, output: Path, **task_args: Any) -> RunConfig:
    items, users, actions = "item", "user", "action"
    rows = {items: 20, users: 7, actions: 4}
    dataset = BenchmarkDatasetArgs(
        feature_args=[
            FeatureArgs(
                feature_names=[items, actions],
                max_sequence_length=9,
                is_jagged=True,
                value_dists=[RandomDistribution(dist_type="zipf"), RandomDistribution()],
            ),
            FeatureArgs(feature_names=[users], max_sequence_length=1),
        ],
        embedding_args=[
            EmbeddingArgs(
                feature_names=[name],
                table_name=name,
                item_vocab_size_or_capacity=count,
                sharding_type="data_parallel" if name == actions else "model_parallel",
            )
            for name, count in rows.items()
        ],
        item_feature_name=items,
        contextual_feature_names=[users],
        action_feature_name=actions,
        num_generated_batches=3,
    )
    own = {"prediction_head_arch": [8, 2], "num_tasks": 2} if task == "ranking" else {}
    trainer = {"max_train_iters": 5, "eval_at_end": True}
    return run_config(task, dataset, (), output, trainer=trainer, task_args=own | task_args)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("ranking", {"eval_metrics": ("AUC", "GAUC", "NE")}),
        ("retrieval", {}),
        ("retrieval", {"negatives": "uniform", "num_negatives": 4}),
        ("retrieval", {"negatives": "full", "filter_seen": False}),
    ],
)
def test_random_data_trains_and_evaluates(mesh: Mesh, tmp_path: Path, task: str, options: dict[str, Any]) -> None:
    finished = run(random_config(task, tmp_path, **options), mesh)
    assert len(finished.losses) == 5 and finished.evaluations == [(5, "valid")]
    assert finished.records[-1]["epoch"] == pytest.approx(5 / 3)
    assert all(value is not None and np.isfinite(value) for value in finished.metrics.values())


def test_random_batches_repeat_after_as_many_as_were_asked_for(mesh: Mesh, tmp_path: Path) -> None:
    opened = open_source(random_config("retrieval", tmp_path), mesh)
    assert isinstance(opened, RandomSource) and opened.batches_per_epoch == 3
    batches = opened.train_batches(FIRST)
    seen = [ids(next(batches), "item") for _ in range(6)]
    assert seen[:3] == seen[3:] and seen[0] != seen[1] != seen[2]
    evaluated = [ids(batch, "item") for batch in opened.eval_batches("valid")]
    assert len(evaluated) == 3 and evaluated[0] != seen[0]


# --- the class of a ranking head that an action is -------------------------------------------------------------------


def data_with(actions: int, least: int = 0) -> Any:
    """Data whose actions are least, …, actions - 1."""
    roles = SimpleNamespace(action="stars")
    return SimpleNamespace(roles=roles, cardinalities={"stars": actions}, least_action=least)


def head(*widths: int, num_tasks: int = 1) -> RankingArgs:
    return RankingArgs(prediction_head_arch=list(widths), num_tasks=num_tasks)


@pytest.mark.parametrize(
    ("args", "data", "offset"),
    [
        (head(8, 5), data_with(6, least=1), 1),  # ratings 1 to 5, five classes
        (head(8, 6), data_with(6, least=1), 0),
        (head(8, 6), data_with(6, least=0), 0),
        (head(8, 9), data_with(6), 0),
        (head(8, 8, num_tasks=8), data_with(256), 0),  # bits
        (head(8, 1), data_with(2), 0),
        (head(8, 3, num_tasks=3), data_with(256), 0),
    ],
)
def test_class_0_is_action_0_unless_the_head_has_no_class_for_it(args: RankingArgs, data: Any, offset: int) -> None:
    assert label_offset(args, data) == offset


def test_a_head_with_too_few_classes_is_refused_with_those_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"ends in 4 classes, but 'stars' goes up to 5: end it in 5 .* or 6"):
        label_offset(head(8, 4), data_with(6, least=1))


def test_a_head_without_a_class_for_action_0_is_refused_where_the_data_has_it() -> None:
    with pytest.raises(ConfigError, match=r"serve the actions 1 to 5, but 'stars' also takes the value 0: end it in 6"):
        label_offset(head(8, 5), data_with(6, least=0))


def test_ranking_without_an_action_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranking needs an action feature"):
        label_offset(head(8, 5), SimpleNamespace(roles=SimpleNamespace(action=None)))  # type: ignore[arg-type]
