"""Options of the training loop."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Optional

from hstu.config.option import STORED_DATA, Args, having, not_having, option

OF_WHAT_IS_LOADED = not_having("ckpt_load_dir", "", why="nothing is loaded")
OF_ANOTHER_RUN = (
    OF_WHAT_IS_LOADED,
    not_having("ckpt_load_dir", "auto", why="it is for checkpoints of other runs", strict=True),
)
NEVER = 999_999_999
"""Intervals from here on mean never, as in files of other trainers."""
_INTERVAL = r"(?=.*[1-9])(\d+(?:\.\d+)?|\.\d+) ?epoch"


def _interval(default: int | None, **limits: Any) -> Any:
    return option(default, changes="reports", words=("1 epoch",), pattern=_INTERVAL, **limits)


def split_interval(value: int | str) -> tuple[Fraction, str]:
    """Return number and unit of an interval: "iteration" or "epoch"."""
    found = re.fullmatch(_INTERVAL, value) if isinstance(value, str) else None
    return (Fraction(found[1]), "epoch") if found else (Fraction(value), "iteration")


class TrainerArgs(Args):
    """The training loop: batch sizes, run length, evaluation, checkpoints, data loading and the run directory."""

    train_batch_size: int = option(changes="training", minimum=1, maximum=10_000_000)
    """Sequences per rank in a training step, or with tokens_per_rank at most. The ranks that share a dense model or its
    tokens train on this number times the size of their group."""
    eval_batch_size: int = option(changes="speed", minimum=1, maximum=10_000_000)
    """Sequences per rank in an evaluation step."""
    eval_interval: int | str = _interval(100, minimum=0)
    """Iterations (optimizer steps) between two evaluations, or passes over the data, such as "0.5 epoch". 0: never
    during training, see eval_at_end."""
    log_interval: int | str = _interval(100, minimum=1)
    """Iterations or epochs between two log lines."""
    max_train_iters: Optional[int] = option(None, changes="training", minimum=1)
    """Iterations to train. None: one pass over the data. A number above one pass continues with reshuffled epochs."""
    num_train_epochs: Optional[float] = option(None, changes="training", above=0, excludes={"max_train_iters": ""})
    """Passes over the data to train; may be fractional. Exclusive with max_train_iters."""
    max_eval_iters: Optional[int] = option(None, changes="reports", minimum=1)
    """Maximum number of batches per rank in an evaluation. None: the whole evaluation set."""
    seed: int = option(1234, changes="training", minimum=0, maximum=2**32 - 1)
    """Random seed of initial weights, data order, dropout and negatives."""
    profile: bool = option(False, changes="reports")
    """Write a torch.profiler trace of the iterations [profile_step_start, profile_step_end)."""
    profile_step_start: int = option(100, changes="reports", minimum=0, needs=having("profile", True))
    """First profiled iteration."""
    profile_step_end: int = option(200, changes="reports", minimum=1, needs=having("profile", True))
    """First iteration after the profiled ones."""
    ckpt_save_interval: Optional[int | str] = _interval(None, minimum=-1)
    """Iterations or epochs between two checkpoints. The last state (save_at_end) and the best one
    (best_metric) are saved as well. None: only these. -1, or from 999999999 on: save none."""
    ckpt_save_dir: Optional[str] = option(None, changes="reports", not_empty=True)
    """Directory of the checkpoints, one subdirectory per saved iteration. Two runs must not share it. A URL: they are
    written to DatasetArgs.cache_dir, and uploaded in the background. None:
    ./checkpoints/<name of the run's directory>. With ckpt_load_dir = "auto" and no output_dir, it is ./checkpoints/<gin
    file name>, so that the next start finds the checkpoints."""
    ckpt_load_dir: str = option("", changes="reports")
    """Checkpoint to start from, a path or a URL: a checkpoint directory, a directory of checkpoints or the directory of
    a run, of which the latest is loaded. "auto" loads the latest one in ckpt_save_dir if there is any, or the one
    before if the latest is damaged."""
    ckpt_load_strict: bool = option(True, changes="reports", needs=OF_WHAT_IS_LOADED)
    """True: any mismatch between checkpoint and model is an error. False: load the tensors that match, initialise the
    others, and report which are missing, unexpected or of another size. A table that has grown keeps the saved
    rows."""
    ckpt_load_optimizer: bool = option(True, changes="training", needs=OF_ANOTHER_RUN)
    """True: continue the saved run. False (fine-tuning): load only the weights, from a checkpoint or an export, and
    start at iteration 0 with new optimizer states, schedule and data order."""
    continue_on: Optional[str] = option(
        None,
        changes="training",
        choices=("new_events", "all"),
        needs=(OF_WHAT_IS_LOADED, having("ckpt_load_optimizer", True, why="weights alone start at iteration 0")),
    )
    """What a run that resumes trains on if its data has changed since the checkpoint, in a new phase of the run.
    new_events: each event that appending has brought since, once per pass, after the events before it. An error if the
    first pass of the phase before was not finished. all: everything, from the start of an epoch; also of other data.
    The length of the run (max_train_iters, num_train_epochs) is that of the phase, while iterations count on. Tables
    find their rows by raw id, and new ids start as initialised. On the same data, the run resumes in the phase of the
    checkpoint. None: changed data is an error."""
    ckpt_param_map: Optional[str] = option(None, changes="reports", needs=OF_ANOTHER_RUN)
    """Text file that renames tensors of the checkpoint. Each line is "new old": the tensor "new" of this run, or every
    tensor whose name starts with "new.", is named "old" in the checkpoint. scripts/inspect_checkpoint.py prints the
    names (model.…). Optimizer states are renamed with their weights."""
    save_at_end: bool = option(True, changes="reports")
    """Save a checkpoint after the last iteration, unless ckpt_save_interval = -1."""
    ckpt_keep_last: Optional[int] = option(None, changes="reports", minimum=1)
    """Number of newest checkpoints to keep in ckpt_save_dir; older ones are deleted after each save. The best
    checkpoint is always kept. None: keep all."""
    ckpt_async: bool = option(False, changes="speed")
    """Write checkpoints in the background: training waits only for the copy to host memory."""
    pipeline_type: str = option("native", changes="speed", choices=("none", "native", "prefetch"))
    """Overlap between a step and the following batches. none: no overlap. native: overlaps their copy to the device
    and the exchange of their ids. prefetch: also overlaps the filling of the tables' caches. All three compute the
    same losses."""
    enable_balanced_shuffler: bool = option(False, changes="speed")
    """Distribute the sequences of each global batch so that all data-parallel ranks have about the same attention cost
    in FLOPs. The global batch, the sequences per rank and the loss do not change."""
    tokens_per_rank: Optional[int] = option(None, changes="training", minimum=1)
    """Dynamic batching: each rank takes sequences until the next one would exceed this number of tokens (context,
    items and actions), or until it has train_batch_size sequences. The loss remains the mean over the labels of the
    global batch. enable_balanced_shuffler then balances the cost within this limit. None: train_batch_size sequences
    per rank."""
    eval_at_start: bool = option(False, changes="reports")
    """Evaluate before the first iteration."""
    eval_at_end: bool = option(True, changes="reports")
    """Evaluate after the last iteration; for retrieval, on the test split."""
    best_metric: Optional[str] = option(None, changes="reports", capitals=True)
    """One of the task's eval_metrics, such as "NDCG@10", "AUC/task1" or "AUC/click". Unless ckpt_save_interval = -1,
    the checkpoint with its best value on the first evaluated split ("valid" if there is one) is kept under the name
    "best"; it is saved at once if that iteration has none. The final evaluation on "test" and the commands use it."""
    best_metric_mode: str = option(
        "max", changes="reports", choices=("max", "min"), needs=not_having("best_metric", None)
    )
    """Whether a larger or a smaller best_metric is better. LOGLOSS, NE, RMSE and MAE need "min"."""
    early_stop_patience: Optional[int] = option(
        None,
        changes="training",
        minimum=1,
        needs=(
            not_having("best_metric", None, why="it counts evaluations of that metric", strict=True),
            not_having("eval_interval", 0, why="it counts evaluations", strict=True),
        ),
    )
    """Stop after this many consecutive evaluations in which best_metric does not improve. None: never."""
    max_grad_norm: float = option(0.0, changes="training", minimum=0)
    """Maximum global L2 norm of the dense gradients; larger gradients are scaled down to it. 0: no clipping."""
    gradient_accumulation_steps: int = option(
        1,
        changes="training",
        minimum=1,
        maximum=1_000_000,
        excludes={"tokens_per_rank": "micro-batches have equal counts of sequences"},
    )
    """Micro-batches per iteration, each of train_batch_size sequences per rank. The update, including tables and
    negatives, equals that of one batch of the combined size; activations take the memory of one micro-batch.
    Table rows are looked up once for all micro-batches."""
    deterministic: bool = option(False, changes="speed")
    """Use only deterministic algorithms, so that a repeated run is bitwise equal. An operation that has no
    deterministic algorithm is an error. On a GPU, CUBLAS_WORKSPACE_CONFIG is set to :4096:8 unless it is set."""
    collective_timeout_s: float = option(600.0, changes="reports", above=0, maximum=10_000_000)
    """Seconds without progress (a step, or a batch of an evaluation) after which a rank ends the run as stuck."""
    data_workers: int = option(0, changes="speed", minimum=0, maximum=1000, needs=STORED_DATA)
    """Processes per rank that read and collate batches. 0: the training process does it."""
    data_prefetch: int = option(
        2,
        changes="speed",
        minimum=1,
        maximum=10_000,
        needs=not_having("data_workers", 0, why="only data workers prepare batches in advance"),
    )
    """Batches that each data worker prepares in advance."""
    bad_row_policy: str = option("raise", changes="training", choices=("raise", "skip"), needs=STORED_DATA)
    """What happens to a sample with damaged data. raise: the run ends with an error. skip: the sample is left out and
    counted, with a warning; a rank that has skipped 100 ends the run at the next one."""
    output_dir: Optional[str] = option(None, changes="reports")
    """Directory of the run. None: runs/<gin file name>-<time>."""
    tensorboard: bool = option(True, changes="reports")
    """Write TensorBoard event files to <output_dir>/tensorboard."""
    wandb_project: Optional[str] = option(None, changes="reports", not_empty=True)
    """Weights & Biases project that receives the metrics and the configuration (needs pip install 'hstu-trainer[wandb]'
    and wandb login). With WANDB_MODE=offline the data is written to <output_dir>/wandb. None: off."""
    progress_bar: str = option("auto", changes="reports", choices=("auto", "on", "off"))
    """Show a progress bar. auto: if standard error is a terminal."""
    gc_interval: int = option(0, changes="speed", minimum=0)
    """If above 0, turn automatic garbage collection off and collect every this many iterations, at the same iteration
    on all ranks."""

    @property
    def saves_checkpoints(self) -> bool:
        """Whether the run saves checkpoints."""
        every = self.ckpt_save_interval
        return every is None or isinstance(every, str) or 0 <= every < NEVER

    @property
    def sequences_per_iteration(self) -> int:
        """Maximum number of sequences per rank and iteration, over all micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps
