"""Small valid gin files, and changed versions of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hstu.config.rules import RULES
from hstu.data.rules import DATA_RULES

ALL_RULES = (*RULES, *DATA_RULES)
"""The rules that the entry scripts apply."""


def table(scope: str, rows: int, cls: str = "EmbeddingArgs", **arguments: Any) -> list[str]:
    """Bindings of a table. Its feature is called like the scope unless ``feature_names`` is given."""
    given = {"feature_names": [scope], "table_name": scope, "item_vocab_size_or_capacity": rows, **arguments}
    return [f"{scope}/{cls}.{name} = {value!r}" for name, value in given.items()]


def text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


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
BENCHMARK = text(
    [
        *(line for line in RANKING.splitlines() if not line.startswith("DatasetArgs")),
        'seq/FeatureArgs.feature_names = ["item", "action"]',
        "seq/FeatureArgs.max_sequence_length = 30",
        "seq/FeatureArgs.is_jagged = True",
        'ctx/FeatureArgs.feature_names = ["user"]',
        "ctx/FeatureArgs.max_sequence_length = 1",
        'EmbeddingArgs.sharding_type = "data_parallel"',
        *table("item", 100),
        *table("action", 6),
        *table("user", 50),
        "BenchmarkDatasetArgs.feature_args = [@seq/FeatureArgs(), @ctx/FeatureArgs()]",
        "BenchmarkDatasetArgs.embedding_args = [@item/EmbeddingArgs(), @action/EmbeddingArgs(), @user/EmbeddingArgs()]",
        'BenchmarkDatasetArgs.item_feature_name = "item"',
        'BenchmarkDatasetArgs.action_feature_name = "action"',
        'BenchmarkDatasetArgs.contextual_feature_names = ["user"]',
    ]
)
OWN_TABLES = text(
    [*table("item", 100, sharding_type="model_parallel"), *table("action", 6, sharding_type="data_parallel")]
)
OWN_DATA = RANKING.replace("ml-1m", "criteo") + OWN_TABLES

USER_TASKS = OWN_DATA + text(
    [
        "RankingArgs.tasks = [@click/RankingTaskArgs(), @stars/RankingTaskArgs()]",
        'click/RankingTaskArgs.label = "clicked"',
        'stars/RankingTaskArgs.label = "action"',
        'stars/RankingTaskArgs.kind = "class"',
        "stars/RankingTaskArgs.num_classes = 5",
    ]
)

BASES = {
    "ranking": RANKING,
    "retrieval": RETRIEVAL,
    "benchmark": BENCHMARK,
    "own": OWN_DATA,
    "tasks": USER_TASKS,
}


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
