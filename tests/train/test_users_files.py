"""Gin files as users bring them from other trainers train, at a reduced size, on data of the shape that they name."""

from pathlib import Path

import numpy as np
import pytest

from hstu.config.args import BenchmarkDatasetArgs, DatasetArgs
from hstu.config.gin_io import load, read_and_check
from hstu.data.datasets import DATASETS, resolve_name
from hstu.parallel.mesh import Mesh
from tests.config.gin_files import ALL_RULES
from tests.config.test_users_files import FILES, task_of
from tests.conftest import write_small_store
from tests.train.tiny import run

SMALL = [
    "TrainerArgs.train_batch_size = 3",
    "TrainerArgs.eval_batch_size = 3",
    "TrainerArgs.max_train_iters = 6",
    "TrainerArgs.log_interval = 1",
    "TrainerArgs.tensorboard = False",
    "TrainerArgs.progress_bar = 'off'",
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.hidden_size = 16",
    "NetworkArgs.num_attention_heads = 2",
    "NetworkArgs.kv_channels = 8",
    "NetworkArgs.num_position_buckets = 64",
]
SMALLER = {
    "benchmark_ranking": [
        "item_and_action/FeatureArgs.max_sequence_length = 12",
        "video/DynamicEmbeddingArgs.item_vocab_size_or_capacity = 50",
        "user/EmbeddingArgs.item_vocab_size_or_capacity = 50",
        "BenchmarkDatasetArgs.max_num_candidates = 4",
        "BenchmarkDatasetArgs.num_generated_batches = 2",
    ],
    "benchmark_ranking_host_memory": [
        "seq/FeatureArgs.max_sequence_length = 12",
        "lengths/RandomDistribution.low = 2",
        "lengths/RandomDistribution.mean = 6",
        "item/DynamicEmbeddingArgs.item_vocab_size_or_capacity = 50",
        "BenchmarkDatasetArgs.max_num_candidates = 1",
        "BenchmarkDatasetArgs.num_generated_batches = 2",
    ],
    "benchmark_retrieval": [
        "items/FeatureArgs.max_sequence_length = 12",
        "item/EmbeddingArgs.item_vocab_size_or_capacity = 50",
        "user/EmbeddingArgs.item_vocab_size_or_capacity = 50",
        "BenchmarkDatasetArgs.num_generated_batches = 2",
    ],
    "criteo_ranking": ["NetworkArgs.item_embedding_dim = 8", "NetworkArgs.contextual_embedding_dim = 4"],
}


def write_data(name: str) -> None:
    """A small store for a dataset, in tmp_data of the working directory: 30 users with 14 events each."""
    schema = DATASETS[built_in].schema if (built_in := resolve_name(name)) else None
    rng = np.random.default_rng(0)
    actions = (schema.action_cardinality or 2) if schema else 2
    write_small_store(
        Path("tmp_data") / (built_in or name),
        rng.integers(0, 40, (30, 14)).tolist(),
        actions=rng.integers(0, actions, (30, 14)).tolist(),
        num_actions=actions,
        context={feature: list(range(30)) for feature in (schema.context if schema else ("site",))},
        item_feature=schema.item if schema else "ad",
        action_feature=(schema.action or "action") if schema else "clicked",
        name=built_in or name,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_users_file_trains(file: Path, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = load([str(file)], [], task_of(file)).dataset
    if isinstance(dataset, DatasetArgs):
        write_data(dataset.dataset_name)
    small = [*SMALL, "TrainerArgs.output_dir = 'run'", *SMALLER.get(file.stem, [])]
    config, _ = read_and_check([str(file)], small, task_of(file), world_size=1, rules=ALL_RULES)
    assert isinstance(config.dataset, BenchmarkDatasetArgs) == file.stem.startswith("benchmark")
    finished = run(config, mesh)
    assert len(finished.losses) == 6 and np.isfinite(finished.losses).all()
    assert finished.summary["status"] == "done"
    assert all(value is not None for value in finished.metrics.values())
