"""Options of optimization: optimizers, learning-rate schedule and precision."""

from __future__ import annotations

from typing import Optional

from hstu.config.option import Args, having, not_having, option

OPTIMIZERS = ("adam", "adamw", "sgd", "adagrad", "rowwise_adagrad", "partial_rowwise_adam")
ROWWISE = {"rowwise_adagrad": "adagrad", "partial_rowwise_adam": "adam"}
"""Optimizers with a state of one number per row → the same with states of the size of the weight."""
OF_MATRICES = {"muon": "adam"}
"""Optimizers that train only the matrices of layers → that of all other weights and of tables."""
_DENSE = (*(name for name in OPTIMIZERS if name not in ROWWISE), *OF_MATRICES)
WITH_A_DECAY = having("schedule", "linear", "cosine", "cosine_restarts", "exponential", "warmup_stable_decay")


class OwnOptimizerArgs(Args):
    """The optimizer of a table or of a part of the dense weights."""

    optimizer_str: Optional[str] = option(None, changes="tensors", choices=OPTIMIZERS)
    """Optimizer. None: OptimizerArgs.optimizer_str, or sparse_optimizer_str for a model_parallel table.
    rowwise_adagrad: model_parallel tables only. partial_rowwise_adam: tables only."""
    learning_rate: Optional[float] = option(None, changes="training", above=0, maximum=1e6)
    """Peak learning rate. None: OptimizerArgs.learning_rate, or sparse_learning_rate for a model_parallel table."""


class PartOptimizerArgs(OwnOptimizerArgs):
    """Settings of some dense weights, for OptimizerArgs.part_optimizers. All share its betas, epsilon and momentum."""

    optimizer_str: Optional[str] = option(None, changes="tensors", choices=_DENSE)
    """Optimizer. None: OptimizerArgs.optimizer_str."""
    regex: str = option(changes="tensors", not_empty=True)
    """Python regular expression that is searched anywhere in the name of a dense weight. The names are as in a
    checkpoint, without "model.", such as task.encoder.stack.layers.0.uvqk.weight. For tables, use
    EmbeddingArgs.optimizer_str."""
    weight_decay: Optional[float] = option(None, changes="training", minimum=0)
    """Decoupled weight decay; norms and biases never decay. None: OptimizerArgs.weight_decay."""


class OptimizerArgs(Args):
    """The optimizers of the dense part and of the tables."""

    optimizer_str: str = option(changes="tensors", choices=(*OPTIMIZERS, *OF_MATRICES))
    """Optimizer. rowwise_adagrad is for tables; the dense part then uses adagrad. partial_rowwise_adam is adam whose
    second moment has one number per row of a table, and so half of its state; the dense part then uses adam. muon is
    torch.optim.Muon for the matrices of linear layers, with momentum 0.95 and steps of the size of Adam's (Moonshot,
    arXiv:2502.16982); all other weights and the tables then use adam. It needs whole matrices on each rank."""
    learning_rate: float = option(changes="training", above=0, maximum=1e6)
    """Peak learning rate."""
    adam_beta1: float = option(0.9, changes="training", minimum=0, below=1)
    """Decay of the first moment of adam, adamw and partial_rowwise_adam."""
    adam_beta2: float = option(0.999, changes="training", minimum=0, below=1)
    """Decay of the second moment of adam, adamw and partial_rowwise_adam."""
    adam_eps: float = option(1e-8, changes="training", above=0)
    """Epsilon of all optimizers but sgd."""
    weight_decay: float = option(0.0, changes="training", minimum=0)
    """Decoupled weight decay of dense weights. Tables, norms and biases never decay."""
    momentum: float = option(0.0, changes="tensors", minimum=0, below=1)
    """Momentum of sgd in the dense part. Tables have none."""
    sparse_optimizer_str: Optional[str] = option(None, changes="tensors", choices=OPTIMIZERS)
    """Optimizer of the model_parallel tables that set no optimizer_str. None: optimizer_str."""
    sparse_learning_rate: Optional[float] = option(None, changes="training", above=0, maximum=1e6)
    """Peak learning rate of the model_parallel tables that set no learning_rate. None: learning_rate."""
    sparse_max_gradient: Optional[float] = option(None, changes="training", above=0)
    """Limit of each element of the gradient of a table row. It is the gradient of the mean loss over the global
    batch, summed over all look-ups of the row; it is clamped to [-limit, limit] before the optimizer of the table, and
    for data_parallel tables after TrainerArgs.max_grad_norm. None: no limit."""
    part_optimizers: list[PartOptimizerArgs] = option([], changes="tensors")
    """Parts of the dense weights with their own optimizer, learning rate or weight decay. A weight belongs to the first
    part whose regex is found in its name. LRScheduleArgs, max_grad_norm and ema_decay apply to all parts."""
    ema_decay: float = option(0.0, changes="tensors", minimum=0, below=1)
    """If above 0, keep an exponential moving average of the dense weights and the data_parallel tables:
    average ← decay · average + (1 - decay) · weight after each iteration, where the decay of iteration t is
    min(ema_decay, t / (t + 9)). Evaluation and recommendation use the average; training does not. The model_parallel
    tables have no average and are used as they are. 0: off."""


class LRScheduleArgs(Args):
    """The learning-rate schedule: one multiplier over time for all learning rates, dense and tables alike. Options of
    tables/LRScheduleArgs make another schedule for all tables, which has the other options of LRScheduleArgs."""

    schedule: str = option(
        "constant",
        changes="training",
        choices=("constant", "linear", "cosine", "cosine_restarts", "exponential", "step", "warmup_stable_decay"),
    )
    """Shape of the decay after the warm-up. warmup_stable_decay: 1 until the last decay_iters or decay_ratio of all
    iterations, over which it falls linearly to min_ratio; each phase that counts_from = "start" adds returns to 1."""
    warmup_iters: Optional[int] = option(None, changes="training", minimum=0)
    """Iterations of linear warm-up. Exclusive with warmup_ratio."""
    warmup_ratio: Optional[float] = option(None, changes="training", minimum=0, below=1, excludes={"warmup_iters": ""})
    """Warm-up as a fraction of all iterations."""
    warmup_start: float = option(0.0, changes="training", minimum=0, maximum=1)
    """Multiplier at the first iteration of the warm-up."""
    decay_iters: Optional[int] = option(None, changes="training", minimum=1, needs=WITH_A_DECAY)
    """Iterations of decay, or of one cycle of cosine_restarts. None: all iterations after the warm-up, except for
    warmup_stable_decay, which needs this or decay_ratio. Exclusive with decay_ratio."""
    decay_ratio: Optional[float] = option(
        None, changes="training", above=0, maximum=1, needs=WITH_A_DECAY, excludes={"decay_iters": ""}
    )
    """Decay as a fraction of all iterations."""
    min_ratio: float = option(
        0.0,
        changes="training",
        minimum=0,
        maximum=1,
        needs=not_having("schedule", "constant", why="there is no decay"),
    )
    """Lower limit of the multiplier during the decay."""
    decay_factor: float = option(
        0.1, changes="training", above=0, maximum=1, needs=having("schedule", "exponential", "step")
    )
    """exponential: multiplier at the end of the decay. step: factor at each milestone."""
    milestones: list[int] = option([], changes="training", minimum=1, needs=having("schedule", "step"))
    """step: iterations, or epochs if by_epoch, at which decay_factor applies."""
    counts_from: str = option("start", changes="training", choices=("start", "phase"))
    """Where the iterations and epochs of the schedule count from, once TrainerArgs.continue_on has begun a phase.
    start: the start of the run; all iterations are then those up to the end of the phase. phase: its start, so that
    each phase warms up and decays."""
    by_epoch: bool = option(False, changes="training")
    """True: the multiplier changes only between epochs, also during the warm-up, and milestones are epochs. All steps
    of an epoch have the multiplier of its first one."""


class PrecisionArgs(Args):
    """Loss scaling and reduced precision; the compute type itself is NetworkArgs.dtype_str."""

    loss_scale: Optional[float | str] = option(
        None,
        changes="training",
        above=0,
        maximum=1e9,
        words=("dynamic",),
        needs=having("NetworkArgs.dtype_str", "float16", why="only float16 gradients vanish without it", strict=True),
    )
    """float16 only: factor on the loss before backward, so that small gradients do not underflow; gradients are divided
    by it in float32. "dynamic": starts at 65536; a step whose gradients overflow is skipped on all ranks and halves it
    (an overflow at 1 ends the run), and growth_interval steps without overflow double it. A number: a constant scale;
    an overflow ends the run. None: "dynamic" with float16, no scaling with other types."""
    growth_interval: int = option(
        2000,
        changes="training",
        minimum=1,
        needs=(
            having("NetworkArgs.dtype_str", "float16", why="only float16 has a loss scale", strict=True),
            having("loss_scale", None, "dynamic", why="a constant scale does not grow"),
        ),
    )
    """loss_scale = "dynamic": consecutive steps without overflow after which the scale doubles."""
    allow_tf32: bool = option(False, changes="training")
    """GPUs: allow PyTorch to multiply float32 matrices in TF32, which has 10 bits of mantissa, also in the softmax over
    a whole pool of items. Our own kernels keep float32 precision in any case."""
    fp32_master_grads: bool = option(
        True,
        changes="training",
        needs=having(
            "NetworkArgs.dtype_str",
            "bfloat16",
            "float16",
            why="it sends gradients in the type of the model, which is already float32",
        ),
    )
    """True: gradients of the dense weights are averaged over data-parallel ranks in float32. False: they are rounded to
    NetworkArgs.dtype_str and sent in half the bytes. In both cases micro-batches are summed in float32, and tables have
    table_exchange_dtype."""
    table_exchange_dtype: str = option("float32", changes="training", choices=("float32", "bfloat16"))
    """Type in which ranks exchange rows of model_parallel tables and their gradients. bfloat16: half the bytes, with 8
    significant bits; lookups of an evaluation on several ranks are rounded, too. Rows and states stay float32."""
