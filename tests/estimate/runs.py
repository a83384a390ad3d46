"""Small runs on random data, as gin bindings, and what one of them really holds, keeps and exchanges."""

from typing import Any

from torch import Tensor

from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.parallel.shards import ShardedView
from tests.config.gin_files import table

ITEMS, USERS, ACTIONS = 3001, 523, 16
DATA = [
    'context/FeatureArgs.feature_names = ["user", "age"]',
    "context/FeatureArgs.max_sequence_length = 1",
    'items/FeatureArgs.feature_names = ["item", "action"]',
    "items/FeatureArgs.max_sequence_length = 40",
    "items/FeatureArgs.is_jagged = True",
    "BenchmarkDatasetArgs.feature_args = [@context/FeatureArgs(), @items/FeatureArgs()]",
    "BenchmarkDatasetArgs.embedding_args = [@item/EmbeddingArgs(), @user/EmbeddingArgs(), @age/EmbeddingArgs(), "
    "@action/EmbeddingArgs()]",
    'BenchmarkDatasetArgs.item_feature_name = "item"',
    'BenchmarkDatasetArgs.contextual_feature_names = ["user", "age"]',
    'BenchmarkDatasetArgs.action_feature_name = "action"',
    "BenchmarkDatasetArgs.num_generated_batches = 4",
]
RUN = [
    "TrainerArgs.train_batch_size = 16",
    "TrainerArgs.eval_batch_size = 16",
    'TrainerArgs.pipeline_type = "none"',
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.hidden_size = 32",
    "NetworkArgs.num_attention_heads = 4",
    "NetworkArgs.kv_channels = 12",
    "NetworkArgs.num_position_buckets = 64",
    'NetworkArgs.dtype_str = "float32"',
    'NetworkArgs.kernel_backend = "pytorch"',
    "NetworkArgs.disable_contextual_mask = True",
    'OptimizerArgs.optimizer_str = "adam"',
    "OptimizerArgs.learning_rate = 1e-3",
]
TASKS = {"ranking": ["RankingArgs.prediction_head_arch = [24, 16]"], "retrieval": ["RetrievalArgs.temperature = 0.1"]}


def run_config(
    task: str = "ranking",
    sharding: str = "row_wise",
    tp: int = 1,
    cp: int = 1,
    bindings: tuple[str, ...] | list[str] = (),
) -> RunConfig:
    """A run that takes a second; ``bindings`` win."""
    tables = [
        *table("item", ITEMS, sharding_type="model_parallel", sharding=sharding),
        *table("user", USERS, sharding_type="model_parallel", sharding=sharding),
        *table("age", 7, sharding_type="data_parallel"),
        *table("action", ACTIONS, sharding_type="data_parallel"),
    ]
    sizes = [
        f"TensorModelParallelArgs.tensor_model_parallel_size = {tp}",
        f"ContextParallelArgs.context_parallel_size = {cp}",
    ]
    return load([], [*DATA, *tables, *RUN, *TASKS[task], *sizes, *bindings], task)  # type: ignore[arg-type]


def held_bytes(state: Tensor | ShardedView) -> int:
    """Bytes of what this rank holds of a state."""
    view = state if isinstance(state, ShardedView) else ShardedView.whole(state)
    return sum(shard.nbytes for shard in view.shards.values())


Sizes = tuple[int, int, int]
"""(ranks, tensor-parallel size, context-parallel size) of a launch."""
ONE, TWO, TWO_BY_TENSOR, TWO_BY_CONTEXT, FOUR = (1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 1)
FOUR_BY_BOTH = 4, 2, 2
UNIFORM = ["RetrievalArgs.negatives = 'uniform'", "RetrievalArgs.num_negatives = 32"]


def _case(launches: list[Sizes], *bindings: str, **run: Any) -> dict[str, Any]:
    return {"launches": launches, "run": {**run, "bindings": list(bindings)}}


CASES: dict[str, dict[str, Any]] = {
    "ranking": _case([ONE, TWO, TWO_BY_TENSOR, TWO_BY_CONTEXT, FOUR, FOUR_BY_BOTH]),
    "no dropout": _case([ONE], "NetworkArgs.hidden_dropout = 0.0"),
    "norm recomputed": _case([ONE, TWO_BY_TENSOR], "NetworkArgs.recompute_input_layernorm = True"),
    "SiLU recomputed": _case([ONE, TWO_BY_TENSOR, TWO_BY_CONTEXT], "NetworkArgs.recompute_input_silu = True"),
    "layer recomputed": _case([ONE, TWO_BY_TENSOR, TWO_BY_CONTEXT], "NetworkArgs.recompute_layer = True"),
    "bfloat16": _case([ONE, TWO_BY_TENSOR], "NetworkArgs.dtype_str = 'bfloat16'"),
    "candidates": _case([ONE], "BenchmarkDatasetArgs.max_num_candidates = 5", "NetworkArgs.interleave_actions = False"),
    "other widths": _case(
        [ONE, TWO, FOUR],
        "NetworkArgs.item_embedding_dim = 20",
        "NetworkArgs.contextual_embedding_dim = 26",
    ),
    "relative bias": _case([ONE, TWO_BY_TENSOR, TWO_BY_CONTEXT], "NetworkArgs.position_encoding = 'relative_bias'"),
    "tokens split": _case([TWO_BY_TENSOR, FOUR, FOUR_BY_BOTH], "NetworkArgs.sequence_parallel = True"),
    "several tasks": _case(
        [ONE],
        "RankingArgs.num_tasks = 8",
        "RankingArgs.prediction_head_arch = [24, 8]",
        "RankingArgs.prediction_head_act_type = 'gelu'",
    ),
    "truncated": _case(
        [ONE, TWO_BY_TENSOR, TWO_BY_CONTEXT],
        "NetworkArgs.truncate_after_layer = 1",
        "NetworkArgs.truncate_to_items = 7",
        "BenchmarkDatasetArgs.max_num_candidates = 5",
    ),
    "in-batch negatives": _case([ONE, TWO, TWO_BY_TENSOR, FOUR], task="retrieval"),
    "in-batch negatives, native": _case([TWO, FOUR], "TrainerArgs.pipeline_type = 'native'", task="retrieval"),
    "in-batch negatives, in two": _case([FOUR], "TrainerArgs.gradient_accumulation_steps = 2", task="retrieval"),
    "uniform negatives": _case([ONE, TWO_BY_TENSOR, TWO_BY_CONTEXT], *UNIFORM, task="retrieval"),
    "mixed negatives": _case(
        [TWO], "RetrievalArgs.negatives = 'mixed'", "RetrievalArgs.num_negatives = 32", task="retrieval"
    ),
    "whole corpus": _case(
        [ONE], "RetrievalArgs.negatives = 'full'", "NetworkArgs.item_embedding_dim = 20", task="retrieval"
    ),
    "table_wise": _case([TWO_BY_TENSOR, FOUR], sharding="table_wise"),
    "column_wise": _case([TWO_BY_TENSOR], "OptimizerArgs.sparse_optimizer_str = 'adagrad'", sharding="column_wise"),
    "planned by TorchRec": _case([TWO_BY_TENSOR], "OptimizerArgs.optimizer_str = 'adagrad'", sharding="auto"),
    "row-wise optimizer": _case([FOUR], "OptimizerArgs.sparse_optimizer_str = 'rowwise_adagrad'"),
    "each in its own way": _case(
        [ONE, TWO_BY_TENSOR],
        "item/EmbeddingArgs.optimizer_str = 'rowwise_adagrad'",
        "age/EmbeddingArgs.optimizer_str = 'sgd'",
        "layers/PartOptimizerArgs.regex = 'uvqk|head'",
        "layers/PartOptimizerArgs.optimizer_str = 'adagrad'",
        "rest/PartOptimizerArgs.regex = 'norm'",
        "rest/PartOptimizerArgs.optimizer_str = 'sgd'",
        "OptimizerArgs.part_optimizers = [@layers/PartOptimizerArgs(), @rest/PartOptimizerArgs()]",
        "OptimizerArgs.ema_decay = 0.9",
    ),
    "weights sharded": _case([TWO, FOUR], "DataParallelArgs.sharding = 'weights'"),
    "weights sharded, sent as bfloat16": _case(
        [TWO],
        "DataParallelArgs.sharding = 'weights'",
        "NetworkArgs.dtype_str = 'bfloat16'",
        "PrecisionArgs.fp32_master_grads = False",
    ),
    "momentum": _case([ONE], "OptimizerArgs.optimizer_str = 'sgd'", "OptimizerArgs.momentum = 0.9"),
}
