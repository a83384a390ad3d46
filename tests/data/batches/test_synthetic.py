from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.base.hashing import random_bits
from hstu.config.args import (
    BenchmarkDatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    FeatureArgs,
    NetworkArgs,
    OptimizerArgs,
    RandomDistribution,
    RankingArgs,
    RetrievalArgs,
    Task,
    TrainerArgs,
)
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.loader import build_loader
from hstu.data.batches.synthetic import Distribution, SyntheticDataset
from hstu.data.sampling.sampler import START, EvalSampler, SamplerPosition, TrainSampler
from tests.data.collators import assert_same, host


def table(features: list[str], rows: int) -> EmbeddingArgs:
    return EmbeddingArgs(
        feature_names=features,
        table_name="_".join(features),
        item_vocab_size_or_capacity=rows,
        sharding_type="model_parallel",
    )


def sequence_group(**options: Any) -> FeatureArgs:
    return FeatureArgs(**{"feature_names": ["item", "action"], "max_sequence_length": 40, "is_jagged": True, **options})


def benchmark_args(items: FeatureArgs | None = None, **options: Any) -> BenchmarkDatasetArgs:
    context = FeatureArgs(feature_names=["age", "sex"], max_sequence_length=1)
    defaults: dict[str, Any] = {
        "feature_args": [items or sequence_group(), context],
        "embedding_args": [table(["item"], 500), table(["action"], 8), table(["age", "sex"], 20)],
        "item_feature_name": "item",
        "action_feature_name": "action",
        "contextual_feature_names": ["sex", "age"],
        "num_generated_batches": 3,
    }
    return BenchmarkDatasetArgs(**{**defaults, **options})


def dataset(
    task: Task = "ranking",
    args: BenchmarkDatasetArgs | None = None,
    ranks: tuple[int, int] = (0, 1),
    batch_size: int = 16,
    seed: int = 1,
    is_training: bool = True,
) -> SyntheticDataset:
    retrieval = RetrievalArgs(negatives="uniform", num_negatives=6)
    config = RunConfig(
        task=task,
        trainer=TrainerArgs(train_batch_size=batch_size, eval_batch_size=batch_size, seed=seed),
        dataset=args or benchmark_args(),
        network=NetworkArgs(
            num_layers=1, hidden_size=8, num_attention_heads=1, kv_channels=8, position_encoding=("relative_bias",)
        ),
        optimizer=OptimizerArgs(optimizer_str="adam", learning_rate=1.0),
        task_args=RankingArgs(prediction_head_arch=[8]) if task == "ranking" else retrieval,
    )
    return SyntheticDataset(config, *ranks, is_training=is_training)


def train_batches(data: SyntheticDataset, count: int, position: SamplerPosition = START) -> list[HSTUBatch]:
    return list(islice(build_loader(data, TrainSampler(*data.shares, 0, False, position)), count))


def quantiles(distribution: RandomDistribution, bound: int, size: int = 200_000) -> np.ndarray:
    uniforms = (random_bits(3, np.arange(size)) >> np.uint64(11)).astype(np.float64) / 2.0**53 + 2.0**-54
    return Distribution(distribution, bound).values(uniforms)


def test_lognormal_values_have_the_mean_of_the_value_itself() -> None:
    values = quantiles(RandomDistribution(dist_type="lognormal", mean=50, std=0.5), bound=100_000)
    assert abs(values.mean() - 50) < 0.5
    assert abs(np.median(values) - 50 * np.exp(-0.125)) < 1


def test_zipf_probabilities_fall_with_the_power_of_the_rank() -> None:
    counts = np.bincount(quantiles(RandomDistribution(dist_type="zipf", alpha=1.2), bound=1000), minlength=1000)
    expected = np.arange(1, 1001) ** -1.2
    expected *= 200_000 / expected.sum()
    assert np.allclose(counts[:20], expected[:20], rtol=0.08)
    assert len(counts) == 1000


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.0 + 1e-9, 1.2])
def test_zipf_ranks_beyond_the_stored_ones_are_those_of_the_whole_sum(alpha: float, monkeypatch: Any) -> None:
    uniforms = (np.arange(50_000) + 0.5) / 50_000
    whole = np.cumsum(np.arange(1, 300_001, dtype=np.float64) ** -alpha)
    expected = np.searchsorted(whole, uniforms * whole[-1], side="right")
    monkeypatch.setattr("hstu.data.batches.synthetic._ZIPF_HEAD", 20_000)
    args = RandomDistribution(dist_type="zipf", alpha=alpha, low=7)
    found = Distribution(args, 300_007).values(uniforms) - 7
    assert np.abs(found - expected).max() <= (abs(alpha - 1) < 0.1)  # its powers are rounded where alpha is near 1


@pytest.mark.parametrize("kind", ["uniform", "normal", "lognormal", "zipf"])
@pytest.mark.parametrize("high", [10**12, 2**63 - 1])
def test_ids_may_be_as_large_as_int64(kind: str, high: int) -> None:
    values = quantiles(RandomDistribution(dist_type=kind, high=high), bound=5)
    assert values.dtype == np.int64 and values.min() >= 0 and values.max() < high
    assert len(np.unique(values)) > 25_000
    assert values.max() > high / 20


def test_draws_are_clipped_to_the_range() -> None:
    values = quantiles(RandomDistribution(dist_type="normal", low=5, high=9, mean=7, std=50), bound=100)
    assert set(np.unique(values)) == {5, 6, 7, 8}


def test_batches_look_like_those_of_real_data() -> None:
    batch = train_batches(dataset(args=benchmark_args(max_num_candidates=4)), 1)[0]
    assert batch.features.keys() == ["sex", "age", "item", "action"]
    lengths = batch.features["item"].lengths()
    assert torch.equal(lengths, batch.features["action"].lengths())
    assert lengths.tolist() == batch.item_lengths.tolist()
    assert 5 <= batch.item_lengths.min() < batch.item_lengths.max() <= 40
    assert batch.features["age"].lengths().tolist() == batch.features["sex"].lengths().tolist() == [1] * 16
    assert batch.num_candidates.tolist() == batch.num_labels.tolist() == [4] * 16
    actions = [row[-4:] for row in batch.features["action"].to_dense()]
    assert torch.equal(batch.labels, torch.cat(actions))
    assert 0 <= batch.labels.min() <= batch.labels.max() < 8
    assert (batch.batch_size, batch.real_batch_size) == (16, 16)


def test_lengths_follow_their_distribution_and_fixed_ones_are_the_longest() -> None:
    short = RandomDistribution(dist_type="normal", mean=10, std=2)
    (batch,) = train_batches(dataset(args=benchmark_args(sequence_group(seqlen_dist=short)), batch_size=4000), 1)
    assert abs(batch.item_lengths.mean() - 10) < 0.2 and abs(batch.item_lengths.std() - 2) < 0.2
    fixed = dataset(args=benchmark_args(sequence_group(is_jagged=False)))
    assert train_batches(fixed, 1)[0].item_lengths.tolist() == [40] * 16


def test_random_data_depends_on_seed_and_place_alone() -> None:
    assert_same(train_batches(dataset(seed=5), 1)[0], train_batches(dataset(seed=5), 1)[0])
    alone = train_batches(dataset(batch_size=16), 1)[0]
    ranks = [train_batches(dataset(batch_size=8, ranks=(rank, 2)), 1)[0] for rank in range(2)]
    for name in ("item", "action", "age"):
        together = torch.cat([rank.features[name].values() for rank in ranks])
        assert torch.equal(alone.features[name].values(), together)
    other = train_batches(dataset(seed=6), 1)[0]
    assert other.features["item"].values().tolist() != alone.features["item"].values().tolist()


def test_a_run_on_random_data_resumes() -> None:
    data = dataset()
    assert_same(train_batches(data, 1, SamplerPosition(0, 32))[0], train_batches(data, 3)[2])


def test_retrieval_has_targets_negatives_times_and_held_out_items() -> None:
    batch = train_batches(dataset("retrieval"), 1)[0]
    assert batch.num_labels.tolist() == (batch.item_lengths - 1).tolist() and batch.num_candidates_host.sum() == 0
    items = batch.features["item"].to_dense()
    assert torch.equal(batch.labels, torch.cat([row[1:] for row in items]))
    assert host(batch.negatives.draws).shape == (batch.num_labels_total, 6) and batch.seen is None

    times = np.split(host(batch.items.timestamps), np.cumsum(batch.item_lengths)[:-1])
    assert all((row[0], np.diff(row).min() > 0) == (1_000_000_000, True) for row in times)
    assert abs(np.concatenate([np.diff(row) for row in times]).mean() / 3600 - 1) < 0.25

    evaluation = dataset("retrieval", is_training=False)
    held_out = next(build_loader(evaluation, EvalSampler(*evaluation.shares)))
    assert held_out.labels.shape == (16,) and 0 <= held_out.labels.min() <= held_out.labels.max() < 500
    assert held_out.seen is not None
    assert torch.equal(held_out.seen.values, held_out.features["item"].values())
    assert torch.equal(held_out.seen.lengths, held_out.features["item"].lengths())


def test_ids_beyond_their_table_are_hashed_into_it() -> None:
    many = [RandomDistribution(high=10**9), RandomDistribution()]
    data = dataset(args=benchmark_args(sequence_group(value_dists=many)))
    items = train_batches(data, 1)[0].features["item"].values()
    assert items.min() >= 0 and 400 < items.max() < 500


def test_a_dynamic_table_gets_ids_as_they_are_drawn() -> None:
    many = [RandomDistribution(dist_type="zipf", high=10**12), RandomDistribution()]
    dynamic = DynamicEmbeddingArgs(feature_names=["item"], table_name="item", item_vocab_size_or_capacity=500)
    tables = [dynamic, *benchmark_args().embedding_args[1:]]
    args = benchmark_args(sequence_group(value_dists=many), embedding_args=tables)
    items = train_batches(dataset(args=args, batch_size=200), 1)[0].features["item"].values()
    assert items.max() > 10**10 and (items == 0).float().mean() > 0.1


def test_distributions_may_be_given_by_feature_and_for_some_features_only() -> None:
    few = RandomDistribution(high=3)
    groups = [sequence_group(value_dists=dists) for dists in ({"action": few}, [RandomDistribution(), few])]
    batches = [train_batches(dataset(args=benchmark_args(group)), 1)[0] for group in groups]
    for name in ("item", "action"):
        assert torch.equal(*(batch.features[name].values() for batch in batches))
    assert batches[0].features["action"].values().max() == 2 < batches[0].features["item"].values().max()


def test_actions_stay_below_the_rows_of_their_table() -> None:
    group = sequence_group(value_dists=[RandomDistribution(), RandomDistribution(high=9)])
    with pytest.raises(ConfigError, match="actions must be below"):
        dataset(args=benchmark_args(group))
