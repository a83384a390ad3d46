"""The options of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from hstu.config.option import Args, option


@dataclass(frozen=True, kw_only=True)
class TrainerArgs(Args):
    """The training loop: how much, how often, where to."""

    train_batch_size: int = option(minimum=1)
    """Sequences per rank in a training step. Under tensor parallelism a group trains on this × its size. With
    tokens_per_rank: the most sequences per rank."""
    eval_batch_size: int = option(minimum=1)
    """Sequences per rank in an evaluation step."""
    eval_interval: int = option(100, minimum=1)
    """Evaluate every this many iterations (optimizer steps)."""
    log_interval: int = option(100, minimum=1)
    """Log every this many iterations."""
    max_train_iters: Optional[int] = option(None, minimum=1)
    """Stop after this many iterations. None: one pass over the data. More than a pass: reshuffled epochs."""
    num_train_epochs: Optional[float] = option(None, above=0)
    """Stop after this many passes over the data (may be fractional). Exclusive with max_train_iters."""
    max_eval_iters: Optional[int] = option(None, minimum=1)
    """Evaluate on at most this many batches a rank. None: the whole evaluation set."""
    seed: int = option(1234, minimum=0, maximum=2**32 - 1)
    """Seed of initial weights, data order, dropout and negatives."""
    profile: bool = option(False)
    """Write a torch.profiler trace of the iterations [profile_step_start, profile_step_end)."""
    profile_step_start: int = option(100, minimum=0)
    """First profiled iteration."""
    profile_step_end: int = option(200, minimum=1)
    """First iteration that is no longer profiled."""
    ckpt_save_interval: int = option(-1, minimum=-1)
    """Save a checkpoint every this many iterations. -1: never."""
    ckpt_save_dir: str = option("./checkpoints", not_empty=True)
    """Directory that receives the checkpoints, one directory an iteration. It must not hold another run's."""
    ckpt_load_dir: str = option("")
    """A checkpoint, a directory of them (the latest is taken), or "auto": the latest in ckpt_save_dir, if any, or
    the one before where that is damaged."""
    ckpt_load_strict: bool = option(True)
    """False: load what fits, leave the rest as initialised, and report what is missing, unexpected or of another size.
    A table with more rows keeps those that the checkpoint has. True: whatever does not fit is an error."""
    ckpt_load_optimizer: bool = option(True)
    """False: load the weights alone (from a checkpoint or an export), and start at iteration 0 with fresh optimizers,
    schedule and data: fine-tuning. True: go on where the checkpoint was."""
    ckpt_param_map: Optional[str] = option(None)
    """A text file of lines "new old": this run's tensor new, or all that begin with new and a dot, is called old in the
    checkpoint. Names as scripts/inspect_checkpoint.py shows them (model.…); optimizer states go with their weights."""
    save_at_end: bool = option(True)
    """Also save after the last iteration, where ckpt_save_interval > 0."""
    ckpt_keep_last: Optional[int] = option(None, minimum=1)
    """Delete all but this many of the newest checkpoints in ckpt_save_dir, once a newer one is complete. The best one
    is always kept. None: keep all."""
    ckpt_async: bool = option(False)
    """Write checkpoints while training goes on: a step waits only until they are copied to host memory."""
    pipeline_type: str = option("native", choices=("none", "native", "prefetch"))
    """How a step overlaps with the next batches: not at all; with their copy to the device and the exchange of their
    ids; and with filling the caches of tables. All kinds compute the same losses."""
    enable_balanced_shuffler: bool = option(False)
    """Share each global batch out so that the data-parallel ranks have equal attention cost (the FLOPs of their
    sequences) to compute. The global batch, the number of sequences per rank and the loss stay what they are."""
    tokens_per_rank: Optional[int] = option(None, minimum=1)
    """Dynamic batching: each rank takes the next sequences until one more would exceed this many tokens (context,
    items, actions) or it has train_batch_size sequences, so set train_batch_size to the most that a rank may take.
    Steps per epoch then depend on the lengths; the loss is the mean over the labels of the global batch as ever.
    With enable_balanced_shuffler, costs are equalised as far as no rank exceeds this. None: train_batch_size
    sequences per rank."""
    eval_at_start: bool = option(False)
    """Evaluate before the first iteration."""
    eval_at_end: bool = option(True)
    """Evaluate after the last iteration (for retrieval on the test split)."""
    best_metric: Optional[str] = option(None)
    """A metric of the task's eval_metrics ("NDCG@10", "AUC/task1"). The checkpoint of its best value on the first
    evaluated split ("valid" where there is one) is kept, under the name "best", where ckpt_save_interval > 0; it is
    saved at once where the iteration has none."""
    best_metric_mode: str = option("max", choices=("max", "min"))
    """Whether larger or smaller values of best_metric are better (LOGLOSS and NE: "min")."""
    early_stop_patience: Optional[int] = option(None, minimum=1)
    """End training after this many evaluations in a row without a better best_metric. None: never."""
    max_grad_norm: float = option(0.0, minimum=0)
    """Clip the global L2 norm of the dense gradients to this. 0: off."""
    gradient_accumulation_steps: int = option(1, minimum=1)
    """An iteration trains on this many times train_batch_size sequences per rank, whose dense part is computed
    train_batch_size at a time: the update of the larger batch, tables and negatives included, with the activations of
    the smaller. Rows of the tables are looked up for all of it at once."""
    deterministic: bool = option(False)
    """Bitwise repeatable runs: deterministic algorithms only, and an error where one has none."""
    collective_timeout_s: float = option(600.0, above=0)
    """Seconds that a rank may stay at one place (a step, a batch of an evaluation) before the run is ended as stuck."""
    data_workers: int = option(0, minimum=0)
    """Processes a rank that read and collate batches. 0: in the training process."""
    data_prefetch: int = option(2, minimum=1)
    """Batches that each data worker keeps ready."""
    bad_row_policy: str = option("raise", choices=("raise", "skip"))
    """A sample whose data is damaged: raise ends the run; skip leaves it out, counts it and warns."""
    max_bad_rows: int = option(100, minimum=1)
    """bad_row_policy = "skip": a rank that has left out more than this many samples ends the run all the same."""
    output_dir: Optional[str] = option(None)
    """Directory of the run. None: runs/<gin file name>-<time>."""
    tensorboard: bool = option(True)
    """Write TensorBoard event files to <output_dir>/tensorboard."""
    wandb_project: Optional[str] = option(None, not_empty=True)
    """Also send the metrics and the configuration to this project of Weights & Biases (pip install 'hstu[wandb]', wandb
    login). With WANDB_MODE=offline they are kept in <output_dir>/wandb. None: do not."""
    progress_bar: str = option("auto", choices=("auto", "on", "off"))
    """Progress bar on the terminal. auto: where standard error is one."""
    gc_interval: int = option(0, minimum=0)
    """> 0: automatic garbage collection off, one collection every this many iterations on all ranks alike."""

    @property
    def sequences_per_iteration(self) -> int:
        """The most sequences per rank that an iteration trains on."""
        return self.train_batch_size * self.gradient_accumulation_steps
