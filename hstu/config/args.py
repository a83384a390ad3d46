"""Every option a user can set, one frozen dataclass a gin class.

The string under a field is its documentation: ``--explain`` and docs/configuration.md are made from it.
What a value must satisfy on its own stands in the field (``choices``, ``minimum``, …) and is enforced both
for gin files and for objects made in Python; checks across classes are in validate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from hstu.config.dataset_args import DatasetArgs
from hstu.config.option import Args, option
from hstu.config.precision_args import PrecisionArgs
from hstu.config.trainer_args import TrainerArgs


@dataclass(frozen=True, kw_only=True)
class EmbeddingArgs(Args):
    """One embedding table and the features that look it up."""

    feature_names: list[str] = option(not_empty=True)
    """Features that share this table."""
    table_name: str = option(not_empty=True)
    """Name of the table, unique in a run."""
    item_vocab_size_or_capacity: int = option(minimum=1)
    """Rows of the table: one more than the largest id."""
    sharding_type: str = option("None", choices=("data_parallel", "model_parallel"))
    """data_parallel: a replica on each rank, trained by the dense optimizer. model_parallel: sharded by TorchRec
    over all ranks. Must be given: the default "None" is deliberately not a valid choice."""
    sharding: str = option("auto", choices=("auto", "row_wise", "table_wise", "column_wise"))
    """How a model_parallel table is cut. auto: TorchRec's planner decides. column_wise: not with rowwise_adagrad."""
    compute_kernel: Optional[str] = option(None, choices=("dense", "fused", "fused_uvm", "fused_uvm_caching"))
    """Kernel of a model_parallel table. fused: FBGEMM updates rows in backward. fused_uvm: rows lie in host memory;
    fused_uvm_caching: with a cache of a fifth of them in GPU memory. dense: rows' gradients go to an Adam of ours; on a
    CPU only. None: fused, on a CPU with adam dense; a CPU runs that whatever is asked for, and warns. Not for dynamic
    tables, whose GPU memory decides."""
    optimizer_str: Optional[str] = option(None, choices=("adam", "adamw", "sgd", "adagrad", "rowwise_adagrad"))
    """Optimizer of this table. None: OptimizerArgs.sparse_optimizer_str, of a data_parallel table
    OptimizerArgs.optimizer_str. rowwise_adagrad: model_parallel only."""
    learning_rate: Optional[float] = option(None, above=0)
    """Peak learning rate of this table. None: OptimizerArgs.sparse_learning_rate, of a data_parallel table
    OptimizerArgs.learning_rate."""
    init_std: float = option(0.02, above=0)
    """Standard deviation of the normal distribution of initial rows."""


@dataclass(frozen=True, kw_only=True)
class DynamicEmbeddingArgs(EmbeddingArgs):
    """A table for ids that no one enumerated, any int64: an id gets a row when it is first trained on."""

    item_vocab_size_or_capacity: int = option(minimum=1)
    """Rows of the table over all ranks. When a rank's share is full, rows are given to other ids (evict_strategy)."""
    sharding_type: str = option("model_parallel", choices=("model_parallel",))
    """Always model_parallel."""
    sharding: str = option("auto", choices=("auto", "row_wise"))
    """Always row_wise."""
    global_hbm_for_values: Optional[int] = option(None, minimum=0)
    """GPU memory for the rows, in bytes over all ranks. Takes precedence over the two capacities below."""
    item_vocab_gpu_capacity: Optional[float] = option(None, above=0)
    """Rows to keep in GPU memory. Takes precedence over the ratio."""
    item_vocab_gpu_capacity_ratio: Optional[float] = option(None, above=0, maximum=1)
    """Share of item_vocab_size_or_capacity to keep in GPU memory, in (0, 1]."""
    evict_strategy: str = option("lru", choices=("lru", "lfu"))
    """Which id loses its row when there is no other: lru, the one that was not trained on for longest; lfu, the one
    that was trained on least often."""
    caching: bool = option(False)
    """What the GPU memory budget is. False: the place of so many rows. True: a cache of a table in host memory."""
    dist_type: str = option("roundrobin", choices=("continuous", "roundrobin", "hash_roundrobin"))
    """The rank that owns an id. roundrobin: id mod ranks. continuous: equal ranges of [0, capacity), ids beyond them
    by id mod ranks. hash_roundrobin: a hash of the id mod ranks."""
    admission_threshold: int = option(0, minimum=0)
    """An id gets a row from this sighting in training on; until then its row is zeros. 0 and 1: at once."""


@dataclass(frozen=True, kw_only=True)
class RandomDistribution(Args):
    """A distribution of lengths or ids for random benchmark data; draws are clipped to [low, high)."""

    dist_type: str = option("uniform", choices=("uniform", "normal", "zipf", "lognormal"))
    """Kind of distribution."""
    low: int = option(0, minimum=0)
    """Smallest value."""
    high: Optional[int] = option(None, minimum=1)
    """One more than the largest value. None: the feature's own bound (its table's rows, its longest sequence)."""
    mean: Optional[float] = option(None)
    """normal: mean; lognormal: mean of the value itself. None: the middle of the range."""
    std: Optional[float] = option(None, above=0)
    """normal: standard deviation; lognormal: that of the logarithm. None: a quarter of the range; 1."""
    alpha: float = option(1.2, above=0)
    """zipf: exponent; value low + k has a probability proportional to 1 / (k + 1)^alpha."""


@dataclass(frozen=True, kw_only=True)
class FeatureArgs(Args):
    """Random benchmark data: a group of features of equal lengths."""

    feature_names: list[str] = option(not_empty=True)
    """Names of the features."""
    max_sequence_length: int = option(minimum=1)
    """Longest sequence (1 for contextual features)."""
    is_jagged: bool = option(False)
    """True: lengths vary, by seqlen_dist. False: every sequence has max_sequence_length."""
    seqlen_dist: Optional[RandomDistribution] = option(None)
    """Distribution of the lengths of jagged features. None: uniform on [1, max_sequence_length]."""
    value_dists: Optional[list[RandomDistribution]] = option(None)
    """Distribution of the ids, one a feature. None: uniform over the feature's table."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkDatasetArgs(Args):
    """Random data generated in memory, to measure speed; replaces DatasetArgs."""

    feature_args: list[FeatureArgs] = option(not_empty=True)
    """The features."""
    embedding_args: list[EmbeddingArgs] = option(not_empty=True)
    """The tables."""
    item_feature_name: str = option(not_empty=True)
    """The feature that is the item."""
    contextual_feature_names: list[str] = option()
    """The features that are context tokens, in this order; may be empty."""
    action_feature_name: Optional[str] = option(None)
    """The feature that is the action."""
    max_num_candidates: int = option(0, minimum=0)
    """As DatasetArgs.max_num_candidates."""
    num_generated_batches: int = option(100, minimum=1)
    """Distinct batches that are generated, then repeated."""


@dataclass(frozen=True, kw_only=True)
class NetworkArgs(Args):
    """The HSTU stack."""

    num_layers: int = option(minimum=1)
    """HSTU layers."""
    hidden_size: int = option(minimum=1)
    """Width D of a token."""
    num_attention_heads: int = option(minimum=1)
    """Attention heads H."""
    kv_channels: int = option(minimum=1)
    """Width d of one head's query, key, value and gate."""
    hidden_dropout: float = option(0.2, minimum=0, below=1)
    """Dropout before the output projection of a layer."""
    input_dropout: Optional[float] = option(None, minimum=0, below=1)
    """Dropout on the input tokens. None: hidden_dropout."""
    norm_epsilon: float = option(1e-5, above=0)
    """Epsilon of the layer norms."""
    is_causal: bool = option(True)
    """False: history tokens see the whole history, also what comes after them."""
    dtype_str: str = option("bfloat16", choices=("bfloat16", "float16", "float32"))
    """Compute type of the dense model; parameters stay float32. float16 is for GPUs (CPUs take very long) and scales
    its loss, see PrecisionArgs."""
    kernel_backend: str = option("cutlass", choices=("cutlass", "triton", "pytorch"))
    """Kernels of the model; on a CPU the first two mean C++ kernels. The log names what runs instead, and why."""
    strict_kernel_backend: bool = option(False)
    """True: it is an error where kernel_backend cannot run."""
    target_group_size: int = option(1, minimum=1)
    """Candidates per group; a candidate sees its own group only."""
    num_position_buckets: int = option(8192, minimum=1)
    """Rows of the absolute position table; positions beyond share the last."""
    position_encoding: str = option("absolute", choices=("absolute", "relative_bias", "none"))
    """absolute: a learned vector per position. relative_bias: learned attention biases by distance and by
    logarithmic time difference."""
    interleave_actions: bool = option(True)
    """True: an action is a token after its item. False: its embedding is added to its item's token."""
    recompute_input_layernorm: bool = option(False)
    """Recompute the input layer norm in backward instead of keeping its output."""
    recompute_input_silu: bool = option(False)
    """Recompute SiLU of the uvqk projection in backward instead of keeping its output."""
    recompute_layer: bool = option(False)
    """Keep only a layer's input and recompute the layer in backward."""
    item_embedding_dim: int = option(-1, minimum=-1)
    """> 0: width of the item (and action) tables, projected to hidden_size."""
    contextual_embedding_dim: int = option(-1, minimum=-1)
    """> 0: width of the contextual tables, projected to hidden_size."""
    scaling_seqlen: int = option(-1, minimum=-1)
    """Divisor N of the attention. -1: the longest possible sequence of tokens."""
    disable_contextual_mask: bool = option(False)
    """True: contextual tokens are causal like all others instead of seeing the whole history."""
    compile: bool = option(False)
    """torch.compile for what is outside of our kernels: perceptrons (prediction head, projections between widths) and
    the loss of ranking. The first step takes some 6 s longer; without a compiler the run goes on without. On a CPU it
    hardly pays: head and loss as in configs/ml_1m_ranking.gin, of 4,100 labels, take 4.4 ms instead of 9.0 in bfloat16
    and 4.3 instead of 4.7 in float32, of steps of 250 and 390 ms."""
    sequence_parallel: bool = option(False)
    """Under tensor parallelism, split the tokens between the layers' projections over the ranks of a group, too: less
    memory for the same result."""

    @property
    def item_width(self) -> int:
        """Width of the item and action tables."""
        return self.item_embedding_dim if self.item_embedding_dim > 0 else self.hidden_size

    @property
    def contextual_width(self) -> int:
        """Width of the contextual tables."""
        return self.contextual_embedding_dim if self.contextual_embedding_dim > 0 else self.hidden_size


@dataclass(frozen=True, kw_only=True)
class PartOptimizerArgs(Args):
    """Dense weights that are trained otherwise than OptimizerArgs says; used in its part_optimizers."""

    regex: str = option(not_empty=True)
    """Python regular expression that is found anywhere in the names of these weights, which are those of a checkpoint
    without "model.", such as task.encoder.stack.layers.0.uvqk.weight. Tables have EmbeddingArgs.optimizer_str."""
    optimizer_str: Optional[str] = option(None, choices=("adam", "adamw", "sgd", "adagrad"))
    """Optimizer. None: OptimizerArgs.optimizer_str. Betas, epsilon and momentum are those of OptimizerArgs."""
    learning_rate: Optional[float] = option(None, above=0)
    """Peak learning rate. None: OptimizerArgs.learning_rate."""
    weight_decay: Optional[float] = option(None, minimum=0)
    """Decoupled weight decay, as OptimizerArgs.weight_decay: not of norms and biases. None: that of OptimizerArgs."""


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs(Args):
    """The optimizers of the dense part and of the tables."""

    optimizer_str: str = option(choices=("adam", "adamw", "sgd", "adagrad", "rowwise_adagrad"))
    """Optimizer. rowwise_adagrad is for tables; the dense part then uses adagrad."""
    learning_rate: float = option(above=0)
    """Peak learning rate."""
    adam_beta1: float = option(0.9, minimum=0, below=1)
    """Decay of the first moment."""
    adam_beta2: float = option(0.999, minimum=0, below=1)
    """Decay of the second moment."""
    adam_eps: float = option(1e-8, above=0)
    """Epsilon of adam, adamw, adagrad and rowwise_adagrad."""
    weight_decay: float = option(0.0, minimum=0)
    """Decoupled weight decay of dense weights; never on tables, norms or biases."""
    momentum: float = option(0.0, minimum=0, below=1)
    """Momentum of sgd, dense part only."""
    sparse_optimizer_str: Optional[str] = option(None, choices=("adam", "adamw", "sgd", "adagrad", "rowwise_adagrad"))
    """Optimizer of the model_parallel tables that have none of their own. None: optimizer_str."""
    sparse_learning_rate: Optional[float] = option(None, above=0)
    """Peak learning rate of the model_parallel tables that have none of their own. None: learning_rate."""
    sparse_max_gradient: Optional[float] = option(None, above=0)
    """Limit of the gradient of every number of a table's row, of the loss's mean over the global batch and summed over
    all places that look the row up: it is cut to [-limit, limit] before the table's optimizer has it, of data_parallel
    tables after TrainerArgs.max_grad_norm. None: no limit."""
    part_optimizers: list[PartOptimizerArgs] = option([])
    """Parts of the dense weights with an optimizer, learning rate or weight decay of their own; a weight belongs to the
    first whose regex is found in its name. One LRScheduleArgs, max_grad_norm and ema_decay are for all."""
    ema_decay: float = option(0.0, minimum=0, below=1)
    """> 0: keep an exponential moving average of the dense weights and the data_parallel tables, average ← ema_decay ·
    average + (1 - ema_decay) · weight after each iteration, from the initial weights on. Evaluations and
    recommendations use it; training does not. The model_parallel tables are used as they are. 0: off."""


@dataclass(frozen=True, kw_only=True)
class LRScheduleArgs(Args):
    """One multiplier over time for every learning rate, dense and tables alike."""

    schedule: str = option(
        "constant", choices=("constant", "linear", "cosine", "cosine_restarts", "exponential", "step")
    )
    """Shape of the decay after warm-up."""
    warmup_iters: Optional[int] = option(None, minimum=0)
    """Iterations of linear warm-up. Exclusive with warmup_ratio."""
    warmup_ratio: Optional[float] = option(None, minimum=0, below=1)
    """The same as a share of all iterations."""
    warmup_start: float = option(0.0, minimum=0, maximum=1)
    """Multiplier at the first iteration of the warm-up."""
    decay_iters: Optional[int] = option(None, minimum=1)
    """Iterations of decay (of one cycle for cosine_restarts). None: all that follow the warm-up."""
    decay_ratio: Optional[float] = option(None, above=0, maximum=1)
    """The same as a share of all iterations."""
    min_ratio: float = option(0.0, minimum=0, maximum=1)
    """Multiplier that linear, cosine, exponential and step do not fall below."""
    decay_factor: float = option(0.1, above=0, maximum=1)
    """exponential: multiplier at the end of the decay; step: factor at each milestone."""
    milestones: list[int] = option([], minimum=1)
    """step: where the factor applies, in iterations or epochs."""
    by_epoch: bool = option(False)
    """True: the schedule moves at epoch ends only, and milestones count epochs."""


@dataclass(frozen=True, kw_only=True)
class TensorModelParallelArgs(Args):
    """Tensor parallelism of the dense part."""

    tensor_model_parallel_size: int = option(1, minimum=1)
    """Ranks that share one dense model. Data-parallel size = world size / this."""


@dataclass(frozen=True, kw_only=True)
class RankingArgs(Args):
    """The ranking task."""

    prediction_head_arch: list[int] = option(not_empty=True, minimum=1)
    """Widths of the prediction head; the last is num_tasks, or the number of classes of one task."""
    prediction_head_act_type: str = option("relu", choices=("relu", "gelu"))
    """Activation between the layers of the head."""
    prediction_head_bias: bool = option(True)
    """Bias in the head's layers."""
    num_tasks: int = option(1, minimum=1)
    """Tasks. Last width = num_tasks: one sigmoid a task on the bits of the action; else one multi-class task."""
    eval_metrics: tuple[str, ...] = option(
        ("AUC",),
        pattern=r"AUC|GAUC|ACC|LOGLOSS|NE|AUC>=\d+",
        examples=("AUC", "AUC>=K", "GAUC", "ACC", "LOGLOSS", "NE"),
        not_empty=True,
    )
    """Metrics: AUC, AUC>=K (star ratings), GAUC, ACC, LOGLOSS, NE."""


@dataclass(frozen=True, kw_only=True)
class RetrievalArgs(Args):
    """The retrieval task."""

    num_negatives: int = option(-1, minimum=-1)
    """Negatives a position. -1 or 0: all of the pool (in_batch), the whole corpus (full)."""
    temperature: float = option(0.05, above=0)
    """Temperature of the softmax."""
    l2_norm_eps: float = option(1e-6, above=0)
    """Lower bound of the norms that queries and items are divided by."""
    negatives: str = option("in_batch", choices=("in_batch", "uniform", "full"))
    """in_batch: distinct items of the batch over all data-parallel ranks. uniform: draws from the corpus. full:
    softmax over the corpus."""
    shared_negatives: bool = option(False)
    """uniform: one set of draws for the whole global batch instead of one for each position."""
    filter_seen: bool = option(True)
    """Evaluation: remove the items that the user has seen."""
    eval_metrics: tuple[str, ...] = option(
        ("HR@10", "NDCG@10"),
        pattern=r"(HR|NDCG|MRR)@[1-9]\d*|MRR",
        examples=("HR@K", "NDCG@K", "MRR@K", "MRR"),
        not_empty=True,
    )
    """Metrics: HR@K, NDCG@K, MRR@K for any K, and MRR."""


ARGS_CLASSES: tuple[type[Args], ...] = (
    TrainerArgs,
    EmbeddingArgs,
    DynamicEmbeddingArgs,
    DatasetArgs,
    FeatureArgs,
    RandomDistribution,
    BenchmarkDatasetArgs,
    NetworkArgs,
    OptimizerArgs,
    PartOptimizerArgs,
    LRScheduleArgs,
    PrecisionArgs,
    TensorModelParallelArgs,
    RankingArgs,
    RetrievalArgs,
)
