"""Options that depend on another option. Most such options need one line here and no other rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hstu.config.args import Args, Task
from hstu.config.incomplete import apply
from hstu.config.option import is_given, options_of
from hstu.config.problems import Problem, literal
from hstu.config.run_config import RunConfig

EXCLUSIVE = (
    ("trainer.max_train_iters", "trainer.num_train_epochs", ""),
    ("trainer.tokens_per_rank", "trainer.gradient_accumulation_steps", "micro-batches have equal counts of sequences"),
    ("trainer.tokens_per_rank", "dataset.stochastic_length_alpha", "batches are planned by the lengths before the cut"),
    ("trainer.enable_balanced_shuffler", "dataset.stochastic_length_alpha", "it balances the lengths before the cut"),
    ("schedule.warmup_iters", "schedule.warmup_ratio", ""),
    ("schedule.decay_iters", "schedule.decay_ratio", ""),
)
"""Two options of which only one may be given, and why if it is not obvious."""


class _Not(tuple[Any, ...]):
    """All values but these."""

    def __contains__(self, value: object) -> bool:
        return not super().__contains__(value)


NEEDS: Iterable[tuple[str, str, tuple[Any, ...], str]] = (
    ("trainer.ckpt_load_optimizer", "trainer.ckpt_load_dir", _Not(["", "auto"]), "it is for checkpoints of other runs"),
    ("trainer.ckpt_param_map", "trainer.ckpt_load_dir", _Not(["", "auto"]), "it is for checkpoints of other runs"),
    ("trainer.early_stop_patience", "trainer.best_metric", _Not([None]), "it counts evaluations of that metric"),
    (
        "network.sequence_parallel", "tensor_parallel.tensor_model_parallel_size", _Not([1]),
        "it splits tokens over the ranks of a tensor-parallel group",
    ),
    ("precision.loss_scale", "network.dtype_str", ("float16",), "only float16 gradients vanish without it"),
    ("precision.growth_interval", "network.dtype_str", ("float16",), "only float16 has a loss scale"),
    ("precision.growth_interval", "precision.loss_scale", (None, "dynamic"), "a constant scale does not grow"),
    (
        "precision.fp32_master_grads", "network.dtype_str", ("bfloat16", "float16"),
        "it sends gradients in the type of the model, which is already float32",
    ),
    ("schedule.milestones", "schedule.schedule", ("step",), ""),
    ("task_args.shared_negatives", "task_args.negatives", ("uniform",), "only uniform negatives are drawn"),
)  # fmt: skip
"""(option, other option, values of the other with which the first has an effect, why if it is not obvious)."""

OF_ONE_TASK = (
    ("dataset.valid_items", "retrieval", "ranking holds out whole users or a period of time"),
    ("dataset.train_fraction", "ranking", "retrieval holds out each user's last items"),
    ("dataset.eval_dataset_path", "ranking", "retrieval holds out each user's last items"),
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
        yield run.problem(*given, text)


def _fits_the_task(run: RunConfig, option: str, task: Task, reason: str) -> Iterator[Problem]:
    if task != run.task and (given := _given(run, option)):
        yield run.problem(*given, f"is for {task} and has no effect here: {reason}; remove it")


def _given(run: RunConfig, option: str) -> tuple[Args, str] | None:
    """(part, parameter) of an option; None if it has its default or the run does not have it."""
    place, parameter = option.split(".")
    part: Args = getattr(run, place)
    fields = {field.name: field for field in options_of(type(part))}
    is_set = parameter in fields and is_given(fields[parameter], getattr(part, parameter))
    return (part, parameter) if is_set else None


RULES = (_for_each(EXCLUSIVE, _not_combined), _for_each(NEEDS, _need_is_met), _for_each(OF_ONE_TASK, _fits_the_task))
