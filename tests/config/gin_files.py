"""Small valid gin files, and changed versions of them."""

from __future__ import annotations

from pathlib import Path

COMMON = """\
TrainerArgs.train_batch_size = 4
TrainerArgs.eval_batch_size = 4
DatasetArgs.dataset_name = "ml-1m"
DatasetArgs.max_sequence_length = 20
NetworkArgs.num_layers = 2
NetworkArgs.hidden_size = 32
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 16
OptimizerArgs.optimizer_str = "adam"
OptimizerArgs.learning_rate = 1e-3
"""
RETRIEVAL = COMMON + "RetrievalArgs.num_negatives = -1\n"
RANKING = COMMON + "RankingArgs.prediction_head_arch = [16, 5]\n"
BENCHMARK = (
    "".join(line + "\n" for line in RANKING.splitlines() if not line.startswith("DatasetArgs"))
    + """\
seq/FeatureArgs.feature_names = ["item", "action"]
seq/FeatureArgs.max_sequence_length = 30
seq/FeatureArgs.is_jagged = True
ctx/FeatureArgs.feature_names = ["user"]
ctx/FeatureArgs.max_sequence_length = 1
EmbeddingArgs.sharding_type = "data_parallel"
item/EmbeddingArgs.feature_names = ["item"]
item/EmbeddingArgs.table_name = "item"
item/EmbeddingArgs.item_vocab_size_or_capacity = 100
action/EmbeddingArgs.feature_names = ["action"]
action/EmbeddingArgs.table_name = "action"
action/EmbeddingArgs.item_vocab_size_or_capacity = 6
user/EmbeddingArgs.feature_names = ["user"]
user/EmbeddingArgs.table_name = "user"
user/EmbeddingArgs.item_vocab_size_or_capacity = 50
BenchmarkDatasetArgs.feature_args = [@seq/FeatureArgs(), @ctx/FeatureArgs()]
BenchmarkDatasetArgs.embedding_args = [@item/EmbeddingArgs(), @action/EmbeddingArgs(), @user/EmbeddingArgs()]
BenchmarkDatasetArgs.item_feature_name = "item"
BenchmarkDatasetArgs.action_feature_name = "action"
BenchmarkDatasetArgs.contextual_feature_names = ["user"]
"""
)
OWN_TABLES = """\
item/EmbeddingArgs.feature_names = ["item"]
item/EmbeddingArgs.table_name = "item"
item/EmbeddingArgs.item_vocab_size_or_capacity = 100
item/EmbeddingArgs.sharding_type = "model_parallel"
action/EmbeddingArgs.feature_names = ["action"]
action/EmbeddingArgs.table_name = "action"
action/EmbeddingArgs.item_vocab_size_or_capacity = 6
action/EmbeddingArgs.sharding_type = "data_parallel"
"""
OWN_DATA = RANKING.replace("ml-1m", "criteo") + OWN_TABLES

BASES = {"ranking": RANKING, "retrieval": RETRIEVAL, "benchmark": BENCHMARK, "own": OWN_DATA}


def task_of(base: str) -> str:
    """The task that one of the ``BASES`` is for."""
    return "retrieval" if base == "retrieval" else "ranking"


def changed(text: str, *lines: str) -> str:
    """``text`` with lines replaced that bind the same parameter, the others appended; "-X" drops the lines of X."""
    result = text.splitlines()
    for line in lines:
        if line.startswith("-"):
            result = [old for old in result if not old.startswith(line[1:])]
            continue
        key = line.partition("=")[0].strip()
        same = [number for number, old in enumerate(result) if old.partition("=")[0].strip() == key]
        if same:
            result[same[0]] = line
        else:
            result.append(line)
    return "\n".join(result) + "\n"


def write(folder: Path, text: str | bytes, name: str = "run.gin") -> str:
    """Writes a gin file, returns its path."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)
