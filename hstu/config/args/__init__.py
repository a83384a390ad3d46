"""All options that a user can set: one frozen dataclass per gin class, one file per topic.

A field declares its default and allowed values (``option``), for gin files and Python alike. The string under a field
is its documentation. Rules across fields are in hstu/config/rules.

``REGISTRY`` is the only list of the classes: gin reading, rules, ``--explain`` and docs/configuration.md use it. To add
a class, add an entry there and, unless only other classes refer to it, a field of RunConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hstu.config.args.dataset import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    FeatureArgs,
    NumericFeatureArgs,
    RandomDistribution,
)
from hstu.config.args.embedding import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.config.args.network import ContextParallelArgs, DataParallelArgs, NetworkArgs, TensorModelParallelArgs
from hstu.config.args.optimizer import LRScheduleArgs, OptimizerArgs, PartOptimizerArgs, PrecisionArgs
from hstu.config.args.task import RankingArgs, RankingTaskArgs, RetrievalArgs
from hstu.config.args.trainer import TrainerArgs
from hstu.config.option import Args

Task = Literal["ranking", "retrieval"]

REGISTRY: Mapping[type[Args], str] = {
    TrainerArgs: "trainer",
    EmbeddingArgs: "embeddings",
    DynamicEmbeddingArgs: "embeddings",
    DatasetArgs: "dataset",
    NumericFeatureArgs: "numbers",
    BenchmarkDatasetArgs: "dataset",
    FeatureArgs: "",
    RandomDistribution: "",
    NetworkArgs: "network",
    OptimizerArgs: "optimizer",
    PartOptimizerArgs: "",
    LRScheduleArgs: "schedule",
    PrecisionArgs: "precision",
    TensorModelParallelArgs: "tensor_parallel",
    DataParallelArgs: "data_parallel",
    ContextParallelArgs: "context_parallel",
    RankingArgs: "task_args",
    RankingTaskArgs: "",
    RetrievalArgs: "task_args",
}
"""Gin class → field of RunConfig that holds its object or objects; "" if only other classes refer to it."""

SEVERAL = ("embeddings", "numbers")
"""Fields of RunConfig that hold one object per gin scope."""

SCOPED: Mapping[tuple[str, type[Args]], str] = {("tables", LRScheduleArgs): "table_schedule"}
"""Gin scope and class → field of RunConfig that holds their object; None if the scope has no binding."""

CLASSES: Mapping[str, type[Args]] = {cls.__name__: cls for cls in REGISTRY}
"""Name in a gin file → class."""

ACCEPTED: Mapping[str, str] = {
    "embedding_backend": "is not read: here the class of a table decides. EmbeddingArgs makes a table of TorchRec, "
    "DynamicEmbeddingArgs a dynamic one"
}
"""Ignored parameter in the gin files of other trainers, for any class → text of the warning."""

REMOVED_DEFAULTS: Mapping[str, Any] = {
    "DatasetArgs.dynamic_tables": False,
    "RankingTaskArgs.positive_from": None,
    "RankingTaskArgs.bit_mask": None,
    "NetworkArgs.side_embedding_dim": 16,
}
"""``Class.parameter`` of earlier versions that decided the labels or the tables → default. A stored configuration with
another value is refused. Its other parameters that this version lacks are ignored."""

TASK_ARGS: Mapping[Task, type[RankingArgs | RetrievalArgs]] = {"ranking": RankingArgs, "retrieval": RetrievalArgs}
"""Task of the entry script → class that is read."""
