"""Options of the HSTU network and of its distribution over the ranks of a group."""

from __future__ import annotations

from typing import Optional

from hstu.config.option import Args, having, not_having, option

SIDE_WIDTH = 16
"""Width of the tables of DatasetArgs.side_feature_names, whose rows are joined and projected to hidden_size."""
NOT_IN_WHOLE_LAYERS = having("recompute_layer", False, why="that recomputes the whole layer")


class NetworkArgs(Args):
    """The HSTU stack."""

    num_layers: int = option(changes="model", minimum=1, maximum=10_000)
    """Number of HSTU layers."""
    hidden_size: int = option(changes="model", minimum=1, maximum=100_000)
    """Width of a token."""
    num_attention_heads: int = option(changes="model", minimum=1, maximum=10_000)
    """Number of attention heads."""
    kv_channels: int = option(changes="model", minimum=1, maximum=10_000)
    """Width of the query, key, value and gate of one head."""
    hidden_dropout: float = option(0.2, changes="training", minimum=0, below=1)
    """Dropout probability before the output projection of a layer."""
    input_dropout: Optional[float] = option(None, changes="training", minimum=0, below=1)
    """Dropout probability on the input tokens. None: hidden_dropout."""
    norm_epsilon: float = option(1e-5, changes="model", above=0)
    """Epsilon of the layer norms."""
    norm_affine: bool = option(True, changes="model")
    """True: the layer norms of the HSTU layers have a learned scale and shift. False, as in the research code of arXiv
    2402.17152: they only normalise."""
    uvqk_bias: bool = option(True, changes="model")
    """True: u, v, q and k have a learned bias before SiLU. False, as in the research code of arXiv 2402.17152: none."""
    output_bias: bool = option(False, changes="model")
    """True, as in the research code of arXiv 2402.17152: the output projection of a layer has a learned bias. False:
    none."""
    is_causal: bool = option(True, changes="model")
    """True: a history token attends to itself and to earlier tokens. False: it attends to the whole history, including
    later tokens."""
    dtype_str: str = option("bfloat16", changes="training", choices=("bfloat16", "float16", "float32"))
    """Data type in which the dense model computes; parameters are always float32. float16 is meant for GPUs (CPUs are
    very slow in it) and scales the loss, see PrecisionArgs."""
    max_attention_span: Optional[int | tuple[Optional[int], ...]] = option(
        None, changes="model", minimum=1, maximum=10_000_000
    )
    """How many tokens of the history a token sees before itself (with is_causal = False, after itself, too), so that
    the cost of attention grows linearly with the length. An interleaved action is a token of its own. Context tokens
    stay visible; candidates see the newest tokens of the history. One number for all layers, or one per layer, such as
    (256, 256, None). None: the whole history. docs/attention_mask.md defines the mask."""
    min_full_attention_tokens: int = option(
        0,
        changes="model",
        minimum=0,
        maximum=10_000_000,
        needs=not_having("max_attention_span", None, why="all tokens see the whole history"),
    )
    """With max_attention_span: the newest tokens of context and history, before the candidates, that see the whole
    history all the same. Above 0, candidates see it, too."""
    truncate_after_layer: Optional[int] = option(
        None, changes="model", minimum=1, maximum=100_000, needs=not_having("truncate_to_items", None, strict=True)
    )
    """This many layers compute on whole sequences. Those after them compute on the context, the newest
    truncate_to_items items of the history, and the candidates. Older items stay what the first layers made of them,
    from which their labels, if they have any, are predicted. None: all layers compute on whole sequences."""
    truncate_to_items: Optional[int] = option(
        None,
        changes="model",
        minimum=1,
        maximum=10_000_000,
        needs=not_having("truncate_after_layer", None, strict=True),
    )
    """With truncate_after_layer: items of the history, with their actions, on which the later layers compute."""
    kernel_backend: str = option("cutlass", changes="speed", choices=("cutlass", "triton", "pytorch"))
    """Kernels of the model. On a CPU, "cutlass" and "triton" both mean the C++ kernels. The log has one line per
    operator: `kernel <operator>: <what runs it> (<why not a better one>)`."""
    strict_kernel_backend: bool = option(False, changes="speed")
    """True: an operator whose kernel cannot run on this machine, or is wrong on it, is an error. An operator or a shape
    without a kernel in kernel_backend is no error."""
    target_group_size: int = option(1, changes="model", minimum=1)
    """Candidates per group. A candidate attends to the history and to the candidates of its own group."""
    num_factors: int = option(0, changes="model", minimum=0, maximum=256)
    """Above 0, in ranking of an action with classes in order, such as stars: width of a factor model inside the
    network, which is fitted anew to the history before each event. An item's token gets the value that it expects, an
    action's token how much the value differs (docs/choosing.md). Programs of exports do not compute it."""
    num_position_buckets: int = option(
        8192, changes="model", minimum=1, maximum=10_000_000, needs=having("position_encoding", "absolute")
    )
    """Rows of the absolute position table. All later positions share the last row."""
    position_encoding: tuple[str, ...] = option(
        ("absolute",), changes="model", choices=("absolute", "relative_bias", "none"), not_empty=True
    )
    """One or both of: absolute, one learned vector per position; relative_bias, learned attention biases by distance
    and by the logarithm of the time difference. none: no position information."""
    attention_scale: Optional[float] = option(None, changes="model", above=0, maximum=1e6)
    """Factor of the products of queries and keys. None: 1 / √kv_channels."""
    interleave_actions: bool = option(True, changes="model")
    """True: an action is a separate token after its item. False: its embedding is added to the token of its item."""
    recompute_input_layernorm: bool = option(False, changes="speed", needs=NOT_IN_WHOLE_LAYERS)
    """Save memory by recomputing the output of the input layer norm in backward."""
    recompute_input_silu: bool = option(False, changes="speed", needs=NOT_IN_WHOLE_LAYERS)
    """Save memory by recomputing the SiLU of the uvqk projection in backward."""
    recompute_layer: bool = option(False, changes="speed")
    """Save memory by storing only the input of each layer and recomputing the layer in backward."""
    item_embedding_dim: int = option(-1, changes="model", minimum=-1, maximum=100_000)
    """Width of the item and action tables if above 0; their rows are then projected to hidden_size. Otherwise
    hidden_size."""
    contextual_embedding_dim: int = option(-1, changes="model", minimum=-1, maximum=100_000)
    """Width of the contextual tables if above 0; their rows are then projected to hidden_size. Otherwise
    hidden_size."""
    scaling_seqlen: int = option(-1, changes="model", minimum=-1)
    """Number by which attention weights are divided. -1: the longest possible sequence in tokens."""
    disable_contextual_mask: Optional[bool] = option(None, changes="model")
    """True: contextual tokens are causal like all others. False: they attend to the whole history. None: False where
    there are candidates, else True, because they would pass later items on to those that are to predict them."""
    compile: bool = option(False, changes="speed")
    """Use torch.compile for the parts outside our kernels: the prediction head, the projections between widths and the
    ranking loss. The first step takes about 6 s longer. Without a C++ compiler the run continues uncompiled."""
    sequence_parallel: bool = option(
        False,
        changes="speed",
        needs=not_having(
            "TensorModelParallelArgs.tensor_model_parallel_size",
            1,
            why="it splits tokens over the ranks of a tensor-parallel group",
        ),
    )
    """With tensor parallelism, also split the tokens between the projections of the layers over the ranks of a group.
    It saves memory and does not change the result."""

    @property
    def has_relative_bias(self) -> bool:
        """Whether attention has learned biases by distance and time."""
        return "relative_bias" in self.position_encoding

    @property
    def needs_times(self) -> bool:
        """Whether the model reads the time of each event, features of the time apart."""
        return self.has_relative_bias

    @property
    def score_factor(self) -> float:
        """Factor of the query-key products."""
        return self.kv_channels**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def attention_spans(self) -> tuple[Optional[int], ...]:
        """max_attention_span of each layer."""
        spans = self.max_attention_span
        return spans if isinstance(spans, tuple) else (spans,) * self.num_layers

    @property
    def has_window(self) -> bool:
        """Whether some layer has a max_attention_span."""
        spans = self.max_attention_span
        return any(span is not None for span in (spans if isinstance(spans, tuple) else (spans,)))

    @property
    def whole_layers(self) -> int:
        """Number of first layers that compute on whole sequences."""
        return self.num_layers if self.truncate_after_layer is None else self.truncate_after_layer

    @property
    def item_width(self) -> int:
        """Width of the item and action tables."""
        return self.item_embedding_dim if self.item_embedding_dim > 0 else self.hidden_size

    @property
    def contextual_width(self) -> int:
        """Width of the contextual tables."""
        return self.contextual_embedding_dim if self.contextual_embedding_dim > 0 else self.hidden_size

    def tokens_per_item(self, has_actions: bool) -> int:
        """Tokens per item: 2 if each action is a separate token, else 1."""
        return 2 if has_actions and self.interleave_actions else 1


class TensorModelParallelArgs(Args):
    """Tensor parallelism of the dense part."""

    tensor_model_parallel_size: int = option(1, changes="speed", minimum=1)
    """Ranks that share one dense model. The data-parallel size is the number of ranks divided by this."""


class DataParallelArgs(Args):
    """Data parallelism of the dense part."""

    sharding: str = option("none", changes="speed", choices=("none", "weights"))
    """What each data-parallel rank holds only a part of. none: nothing, every rank has the whole dense part. weights:
    the weights, their gradients, the states of their optimizers and their moving average (OptimizerArgs.ema_decay).
    Each layer is gathered when it computes, in forward and again in backward (FSDP). Both train the same weights, and
    checkpoints do not depend on it: a run can go on with the other one."""


class ContextParallelArgs(Args):
    """Context parallelism: long sequences are spread over several ranks."""

    context_parallel_size: int = option(1, changes="speed", minimum=1)
    """Ranks that share the tokens of the HSTU layers, of all sequences alike. For attention they split the heads, the
    queries, or both. The data-parallel size is the number of ranks divided by this and the tensor-parallel size."""
