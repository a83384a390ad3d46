"""Training batches of both sources under balancing and dynamic batching, as the ranks of a larger world get them."""

import dataclasses
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import BenchmarkDatasetArgs, EmbeddingArgs, FeatureArgs, RandomDistribution
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.throughput import FlopCounter
from hstu.parallel.mesh import Mesh
from hstu.train.sources import open_source
from tests.train.tiny import tiny_config

RANKS = 3
LENGTHS = RandomDistribution(dist_type="lognormal", low=1, mean=20, std=1.0)


def table(name: str, rows: int) -> EmbeddingArgs:
    return EmbeddingArgs(
        feature_names=[name], table_name=name, item_vocab_size_or_capacity=rows, sharding_type="data_parallel"
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
