"""Options of embedding tables, static and dynamic."""

from __future__ import annotations

from typing import Optional

from hstu.config.args.optimizer import OwnOptimizerArgs
from hstu.config.option import Args, having, option


class NamedFeaturesArgs(Args):
    """Base of the classes that describe some features."""

    feature_names: list[str] = option(changes="tensors", not_empty=True)
    """Names of the features."""


class EmbeddingArgs(NamedFeaturesArgs, OwnOptimizerArgs):
    """One embedding table and the features that share it."""

    table_name: str = option(changes="tensors", not_empty=True)
    """Name of the table, unique in a run."""
    item_vocab_size_or_capacity: int = option(changes="tensors", minimum=1)
    """Rows of the table over all ranks: the largest id plus one; in a dynamic table, one per id that training keeps."""
    sharding_type: str = option("None", changes="tensors", choices=("data_parallel", "model_parallel"))
    """data_parallel: every rank holds a replica. model_parallel: TorchRec shards the table over all ranks. Either way a
    step trains the rows that the batch looks up, and no others. The default "None" is not a valid choice, so this must
    be given."""
    sharding: str = option(
        "auto",
        changes="speed",
        choices=("auto", "row_wise", "table_wise", "column_wise"),
        needs=having("sharding_type", "model_parallel"),
    )
    """How a model_parallel table is sharded. auto: TorchRec's planner decides. column_wise excludes the optimizers
    rowwise_adagrad and partial_rowwise_adam. Dynamic tables are always row_wise. TorchRec's table_row_wise and grid do
    not exist here: it has them only for tables whose rows are pooled."""
    compute_kernel: Optional[str] = option(
        None,
        changes="speed",
        choices=("dense", "fused", "fused_uvm", "fused_uvm_caching"),
        needs=having("sharding_type", "model_parallel"),
    )
    """Kernel of a model_parallel table. fused: FBGEMM updates the rows in backward. fused_uvm: the rows are in host
    memory. fused_uvm_caching: as fused_uvm, with a cache for a fifth of the rows in GPU memory. dense (CPU only): the
    gradients of the rows go to our own optimizer. None: fused, or dense for what FBGEMM lacks on a CPU: adam, adamw
    and partial_rowwise_adam. A CPU always uses these defaults and warns if another kernel is given.
    Not for dynamic tables, whose options for GPU memory decide."""
    init_std: float = option(0.02, changes="training", above=0, maximum=1e6)
    """Standard deviation of initial rows, which are normally distributed but for DynamicEmbeddingArgs.initializer."""


class DynamicEmbeddingArgs(EmbeddingArgs):
    """A table for any int64 ids, without a vocabulary: an id gets a row when training first sees it."""

    sharding_type: str = option("model_parallel", changes="tensors", choices=("model_parallel",))
    """Always model_parallel."""
    global_hbm_for_values: Optional[int] = option(None, changes="speed", minimum=0)
    """GPU memory for the rows, in bytes over all ranks. It takes precedence over the two capacities below."""
    item_vocab_gpu_capacity: Optional[float] = option(None, changes="speed", minimum=0)
    """Number of rows in GPU memory. 0: all rows are in host memory. It takes precedence over the ratio."""
    item_vocab_gpu_capacity_ratio: Optional[float] = option(None, changes="speed", minimum=0, maximum=1)
    """Fraction of item_vocab_size_or_capacity in GPU memory. 0: all rows are in host memory."""
    evict_strategy: str = option("lru", changes="training", choices=("lru", "lfu", "none"))
    """Which id loses its row if a rank has none free. lru: the least recently trained. lfu: the least often trained.
    none: no id does; new ids get no row, as the log says, until one is free by expire_iters or a larger capacity."""
    caching: bool = option(False, changes="speed")
    """Use of the GPU memory. False: it holds that many rows of the table, and host memory holds the others. True: it
    is a cache of the table, which is in host memory."""
    dist_type: str = option("roundrobin", changes="speed", choices=("continuous", "roundrobin", "hash_roundrobin"))
    """Rank that owns an id. roundrobin: id modulo ranks. continuous: equal ranges of [0, capacity); larger ids modulo
    ranks. hash_roundrobin: a hash of the id modulo ranks."""
    admission_threshold: int = option(0, changes="training", minimum=0)
    """Number of times that training must see an id before it gets a row; until then its embedding is zero. 0 and 1:
    at first sight."""
    expire_iters: Optional[int] = option(None, changes="training", minimum=1)
    """Iterations without an id in the training data after which it loses its row, optimizer state and count; it then
    starts over. Checked at every tenth of them, so an id may stay for a tenth longer. None: ids never expire."""
    initializer: str = option("normal", changes="training", choices=("normal", "uniform", "zeros"))
    """Distribution of new rows, of mean 0 and standard deviation init_std. zeros: all 0, so that a new item is what its
    features say; for the items of a retrieval run only with RetrievalArgs.item_tower, as vectors need a direction."""
