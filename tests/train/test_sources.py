"""Batches of random data, the classes of a ranking head for the actions of any data, and how ranks share batches.

Batches of both sources under balancing and dynamic batching are those that the ranks of a larger world get.
"""

import dataclasses
from itertools import chain, islice
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
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.throughput import FlopCounter
from hstu.parallel.mesh import Mesh
from hstu.train.batch_source import label_offset
from hstu.train.sources import RandomSource, open_source
from tests.train.tiny import ids, run, run_config, tiny_config

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
            table(name, count, "data_parallel" if name == actions else "model_parallel") for name, count in rows.items()
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


def test_a_head_without_a_class_for_action_0_is_refused_where_the_data_has_it() -> None:
    with pytest.raises(ConfigError, match=r"serve the actions 1 to 5, but 'stars' also takes the value 0: end it in 6"):
        label_offset(head(8, 5), data_with(6, least=0))


def test_ranking_without_an_action_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranking needs an action feature"):
        label_offset(head(8, 5), SimpleNamespace(roles=SimpleNamespace(action=None)))  # type: ignore[arg-type]


RANKS = 3
LENGTHS = RandomDistribution(dist_type="lognormal", low=1, mean=20, std=1.0)


def table(name: str, rows: int, sharding: str = "data_parallel") -> EmbeddingArgs:
    return EmbeddingArgs(
        feature_names=[name], table_name=name, item_vocab_size_or_capacity=rows, sharding_type=sharding
    )


RANDOM = BenchmarkDatasetArgs(
    feature_args=[
        FeatureArgs(feature_names=["item", "action"], max_sequence_length=60, is_jagged=True, seqlen_dist=LENGTHS),
        FeatureArgs(feature_names=["town"], max_sequence_length=1),
    ],
    embedding_args=[table("item", 50), table("action", 4), table("town", 3)],
    item_feature_name="item",
    action_feature_name="action",
    contextual_feature_names=["town"],
    num_generated_batches=4,
)


def configured(kind: str, store: SequenceStore, output: Path, **trainer: Any) -> RunConfig:
    config = tiny_config("ranking", store, output, trainer={"train_batch_size": 6, **trainer})
    return dataclasses.replace(config, dataset=RANDOM, embeddings=()) if kind == "random" else config


def steps_of(config: RunConfig, mesh: Mesh, position: SamplerPosition, count: int) -> list[tuple[HSTUBatch, ...]]:
    """Global batches, each a tuple over ranks. No communication is needed for them: the ranks are made one by one."""
    sources = [open_source(config, dataclasses.replace(mesh, rank=rank, world_size=RANKS)) for rank in range(RANKS)]
    return list(zip(*(islice(source.train_batches(position), count) for source in sources), strict=True))


def users(step: tuple[HSTUBatch, ...]) -> list[int]:
    return sorted(chain(*(batch.user_ids[: batch.real_batch_size].tolist() for batch in step)))


def rows_of(step: tuple[HSTUBatch, ...]) -> dict[int, list[int]]:
    """User → items, whatever the rank."""
    rows: dict[int, list[int]] = {}
    for batch in step:
        item = batch.features.keys()[1]  # after the one context feature
        items = np.split(batch.features[item].values().numpy(), np.cumsum(batch.item_lengths)[:-1])
        rows |= {int(user): row.tolist() for user, row in zip(batch.user_ids.tolist(), items, strict=True) if user >= 0}
    return rows


@pytest.mark.parametrize("kind", ["store", "random"])
def test_balancing_regroups_the_same_samples(kind: str, store: SequenceStore, tmp_path: Path, mesh: Mesh) -> None:
    plain, balanced = (
        steps_of(configured(kind, store, tmp_path, enable_balanced_shuffler=on), mesh, SamplerPosition(), 2)
        for on in (False, True)
    )
    config = configured(kind, store, tmp_path)
    flops = FlopCounter(config.network, open_source(config, mesh).roles)
    for before, after in zip(plain, balanced, strict=True):
        assert rows_of(before) == rows_of(after) and len(rows_of(after)) > RANKS
        assert [batch.real_batch_size for batch in before] == [batch.real_batch_size for batch in after]
        assert {batch.batch_size for batch in after} == {6}
        assert max(flops.count(batch)[1] for batch in after) < max(flops.count(batch)[1] for batch in before)


@pytest.mark.parametrize("kind", ["store", "random"])
@pytest.mark.parametrize("balance", [False, True])
def test_by_tokens_an_epoch_has_every_sample_once_and_a_resumed_one_the_rest(
    kind: str, balance: bool, store: SequenceStore, tmp_path: Path, mesh: Mesh
) -> None:
    budget = 150 if kind == "random" else 34
    config = configured(kind, store, tmp_path, tokens_per_rank=budget, enable_balanced_shuffler=balance)
    source = open_source(config, dataclasses.replace(mesh, world_size=RANKS))
    count = source.batches_per_epoch
    flops = FlopCounter(config.network, source.roles)
    steps = steps_of(config, mesh, SamplerPosition(), count + 1)
    for step in steps:
        assert {batch.batch_size for batch in step} == {6}
        assert all(batch.real_batch_size <= 6 and flops.count(batch)[0] <= budget for batch in step)
    assert len({batch.real_batch_size for step in steps for batch in step}) > 1
    epoch = [user for step in steps[:count] for user in users(step)]
    position, end = steps[1][0].position, steps[count - 1][0].position
    assert position is not None and end is not None and len(set(epoch)) == len(epoch) == end.consumed
    resumed = steps_of(config, mesh, position, count - 2)
    assert [rows_of(step) for step in resumed] == [rows_of(step) for step in steps[2:count]]


def test_a_budget_below_the_longest_sequence_is_refused(store: SequenceStore, tmp_path: Path, mesh: Mesh) -> None:
    # 8 items with their actions are 16 tokens, which the rules see; the store adds a context token.
    open_source(configured("store", store, tmp_path, tokens_per_rank=17), mesh)
    with pytest.raises(ConfigError, match=r"tokens_per_rank = 16: is less .* has 17 tokens; set it to at least 17"):
        open_source(configured("store", store, tmp_path, tokens_per_rank=16), mesh)
