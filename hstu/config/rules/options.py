"""Options that depend on another option. Most such options need one line here and no other rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hstu.config.args import Args, BenchmarkDatasetArgs, Task
from hstu.config.incomplete import apply
from hstu.config.option import is_given
from hstu.config.problems import Problem, literal
from hstu.config.run_config import RunConfig

EXCLUSIVE = (
    ("trainer.max_train_iters", "trainer.num_train_epochs", ""),
    ("trainer.tokens_per_rank", "trainer.gradient_accumulation_steps", "micro-batches have equal counts of sequences"),
    ("dataset.window_stride", "dataset.random_windows", "windows lie either at every stride or at random"),
    ("dataset.random_windows", "dataset.candidates", "a request has one history, which ends where the request is"),
    ("dataset.valid_fraction", "dataset.eval_dataset_path", "all users of that data are evaluated on"),
    ("dataset.window_stride", "dataset.candidates", "a request has one history, which ends where the request is"),
    ("schedule.warmup_iters", "schedule.warmup_ratio", ""),
    ("schedule.decay_iters", "schedule.decay_ratio", ""),
)
"""Two options of which only one may be given, and why if it is not obvious."""


class _Not(tuple[Any, ...]):
    """All values but these."""

    def __contains__(self, value: object) -> bool:
        return not super().__contains__(value)


_WITH_A_DECAY = ("linear", "cosine", "cosine_restarts", "exponential")

NEEDS: Iterable[tuple[str, str, tuple[Any, ...], str]] = (
    ("trainer.ckpt_load_optimizer", "trainer.ckpt_load_dir", _Not(["", "auto"]), "it is for checkpoints of other runs"),
    ("trainer.ckpt_param_map", "trainer.ckpt_load_dir", _Not(["", "auto"]), "it is for checkpoints of other runs"),
    ("trainer.ckpt_load_strict", "trainer.ckpt_load_dir", _Not([""]), "nothing is loaded"),
    ("trainer.early_stop_patience", "trainer.best_metric", _Not([None]), "it counts evaluations of that metric"),
    ("trainer.early_stop_patience", "trainer.eval_interval", _Not([0]), "it counts evaluations"),
    ("trainer.best_metric_mode", "trainer.best_metric", _Not([None]), ""),
    ("trainer.profile_step_start", "trainer.profile", (True,), ""),
    ("trainer.profile_step_end", "trainer.profile", (True,), ""),
    ("trainer.data_prefetch", "trainer.data_workers", _Not([0]), "only data workers prepare batches in advance"),
    ("network.bfloat16_residual", "network.dtype_str", ("bfloat16",), "layers compute in another type"),
    (
        "network.sequence_parallel", "tensor_parallel.tensor_model_parallel_size", _Not([1]),
        "it splits tokens over the ranks of a tensor-parallel group",
    ),
    (
        "data_parallel.shard_group_size", "data_parallel.sharding", ("optimizer", "weights"),
        "every rank holds the whole dense part",
    ),
    ("data_parallel.reshard_after_forward", "data_parallel.sharding", ("weights",), "only these are gathered"),
    ("precision.loss_scale", "network.dtype_str", ("float16",), "only float16 gradients vanish without it"),
    ("precision.growth_interval", "network.dtype_str", ("float16",), "only float16 has a loss scale"),
    ("precision.growth_interval", "precision.loss_scale", (None, "dynamic"), "a constant scale does not grow"),
    (
        "precision.fp32_master_grads", "network.dtype_str", ("bfloat16", "float16"),
        "it sends gradients in the type of the model, which is already float32",
    ),
    ("dataset.valid_fraction", "dataset.split", ("auto", "user_holdout"), "it is a fraction of the users"),
    ("schedule.milestones", "schedule.schedule", ("step",), ""),
    ("schedule.decay_factor", "schedule.schedule", ("exponential", "step"), ""),
    ("schedule.min_ratio", "schedule.schedule", _Not(["constant"]), "there is no decay"),
    ("schedule.decay_iters", "schedule.schedule", _WITH_A_DECAY, ""),
    ("schedule.decay_ratio", "schedule.schedule", _WITH_A_DECAY, ""),
    (
        "retrieval.shared_negatives", "retrieval.negatives", ("uniform", "popularity"),
        "only these are drawn per position",
    ),
    ("retrieval.popularity_exponent", "retrieval.negatives", ("popularity", "mixed"), "no other kind counts items"),
    ("retrieval.item_id_dropout", "retrieval.item_tower", (True,), "without features an item has its id alone"),
    ("retrieval.logq_correction", "retrieval.negatives", _Not(["full"]), "the whole corpus is not a sample of it"),
)  # fmt: skip
"""(option, other option, values of the other with which the first has an effect, why if it is not obvious)."""

ONLY_TOLD = ("trainer.profile_step_start", "trainer.profile_step_end")
"""Options of ``NEEDS`` that files of other trainers give without need: where they have no effect is a warning."""

OF_STORED_DATA = ("trainer.data_workers", "trainer.bad_row_policy", "task_args.tasks")
"""Options that have no effect on random data, which each rank generates in memory, without labels but the action."""

OF_ONE_TASK = (
    ("dataset.valid_items", "retrieval", "ranking holds out whole users or a period of time"),
    ("dataset.train_fraction", "ranking", "retrieval holds out each user's last items"),
    ("dataset.valid_fraction", "ranking", "retrieval holds out each user's last items"),
    ("dataset.eval_dataset_path", "ranking", "retrieval holds out each user's last items"),
    ("dataset.candidates", "ranking", "retrieval scores the whole corpus"),
    ("dataset.max_num_candidates", "ranking", "retrieval scores the whole corpus"),
)
"""(option, the only task in which it has an effect, why)."""


def _for_each(rows: Iterable[tuple[Any, ...]], check: Callable[..., Iterator[Problem]]) -> Callable[[RunConfig], Any]:
    """A rule that makes one ``check`` per row."""
    return lambda run: (problem for row in rows for problem in apply([check], run, *row))


def _not_combined(run: RunConfig, first: str, second: str, reason: str) -> Iterator[Problem]:
    if (one := _given(run, first)) and (other := _given(run, second)):
        because = f", because {reason}" if reason else ""
        yield run.problem(*other, f"cannot be combined with {run.cite(*one)}{because}; remove one of them")


def _need_is_met(run: RunConfig, option: str, needed: str, values: tuple[Any, ...], reason: str) -> Iterator[Problem]:
    place, parameter = needed.split(".")
    part = getattr(run, place)
    if (given := _given(run, option)) and getattr(part, parameter) not in values:
        wanted = ("a value other than " if isinstance(values, _Not) else "") + " or ".join(map(literal, values))
        because = f", because {reason}" if reason else ""
        text = f"has no effect with {run.cite(part, parameter)}{because}; remove it, or set {parameter} to {wanted}"
        yield run.problem(*given, text, is_warning=option in ONLY_TOLD)


def _reads_a_store(run: RunConfig, option: str) -> Iterator[Problem]:
    if isinstance(run.dataset, BenchmarkDatasetArgs) and (given := _given(run, option)):
        yield run.problem(*given, "has no effect on the random data of BenchmarkDatasetArgs; remove it")


def _fits_the_task(run: RunConfig, option: str, task: Task, reason: str) -> Iterator[Problem]:
    if task != run.task and (given := _given(run, option)):
        yield run.problem(*given, f"is for {task} and has no effect here: {reason}; remove it")


def _given(run: RunConfig, option: str) -> tuple[Args, str] | None:
    """(part, parameter) of an option; None if it has its default or the run does not have it."""
    place, parameter = option.split(".")
    part: Args | None = getattr(run, place)
    return (part, parameter) if part is not None and is_given(part, parameter) else None


RULES = (
    _for_each(EXCLUSIVE, _not_combined), _for_each(NEEDS, _need_is_met), _for_each(OF_ONE_TASK, _fits_the_task),
    _for_each([(option,) for option in OF_STORED_DATA], _reads_a_store),
)  # fmt: skip
