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

REMOVED: Mapping[str, str] = {
    "TrainerArgs.grad_norm_skip_factor": "no step is skipped for its norm: remove it; max_grad_norm clips",
    "RetrievalArgs.request_time": 'remove it for "target", or bind DatasetArgs.query_time = "last_event"',
    "RetrievalArgs.popularity_exponent": "popularity draws with the power 0.75, mixed draws uniformly: remove it",
    "DatasetArgs.dynamic_tables": "bind DynamicEmbeddingArgs for the features whose tables are to be dynamic",
    "DatasetArgs.random_windows": 'for True bind DatasetArgs.window_stride = "random"',
    "RankingTaskArgs.positive_from": 'bind positive_values = [">= 4"] for 4',
    "RankingTaskArgs.bit_mask": 'bind positive_values = ["& 4"] for 4',
    "RetrievalArgs.item_id_dropout": "vectors of items are always made with their ids: remove it",
    "NetworkArgs.bfloat16_residual": "the residual stream has the type of the inputs: remove it",
    "NetworkArgs.side_embedding_dim": "tables of side features have 16 columns: remove it",
    "NetworkArgs.allow_label_leak": "a mask that shows the labels is always an error: remove it",
    "DataParallelArgs.reshard_after_forward": "weights are freed after forward: remove it",
    "DataParallelArgs.shard_group_size": "all ranks with equal dense weights share it: remove it",
}
"""``Class.parameter`` of earlier versions → what to do."""

REMOVED_DEFAULTS: Mapping[str, Any] = {
    "DatasetArgs.dynamic_tables": False,
    "RankingTaskArgs.positive_from": None,
    "RankingTaskArgs.bit_mask": None,
    "NetworkArgs.side_embedding_dim": 16,
}
"""Parameters of REMOVED that decided the labels or the tables → default. A stored configuration with another value is
refused; all other parameters of REMOVED are ignored there."""

TASK_ARGS: Mapping[Task, type[RankingArgs | RetrievalArgs]] = {"ranking": RankingArgs, "retrieval": RetrievalArgs}
"""Task of the entry script → class that is read."""
