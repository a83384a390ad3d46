"""Rules about RankingArgs.tasks: options of each kind of task, names, and labels that are also inputs."""
# ruff: noqa: D103

from __future__ import annotations

import re
from collections.abc import Iterator

from hstu.config.args import DatasetArgs, RankingArgs, RankingTaskArgs
from hstu.config.args.task import LOSSES, METRICS_OF_KIND, fits_kind
from hstu.config.problems import Problem, apply, literal
from hstu.config.run_config import RunConfig


def tasks_of(run: RunConfig) -> list[RankingTaskArgs]:
    """RankingArgs.tasks; empty if there are none."""
    return (run.task_args.tasks or []) if isinstance(run.task_args, RankingArgs) else []


def each_task_is_consistent(run: RunConfig) -> Iterator[Problem]:
    for task in tasks_of(run):
        yield from apply(RULES_OF_A_TASK, run, task)


def kinds_have_their_option(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if task.kind == "class" and task.num_classes is None:
        yield run.problem(task, "kind", "needs RankingTaskArgs.num_classes; bind it under the scope of this task")


def a_condition_stands_alone(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    values = task.positive_values or []
    is_valid = task.positive_from is not None or task.bit_mask is not None
    if not is_valid and any(re.fullmatch(r"(>=|&) *-?[\d.]+", value) for value in values):
        text = "a condition stands alone: >= and a number, or & and a whole number from 1 to 9999999"
        yield run.problem(task, "positive_values", text)


def loss_fits_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if task.loss is not None and task.loss not in LOSSES[task.kind]:
        text = f"is not for {run.cite(task, 'kind')}; use {_any_of(LOSSES[task.kind])}"
        yield run.problem(task, "loss", text)


def metrics_fit_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    for metric in task.metrics or ():
        if not fits_kind(metric, task.kind):
            text = f"{metric} is not for {run.cite(task, 'kind')}; use {_any_of(METRICS_OF_KIND[task.kind])}"
            yield run.problem(task, "metrics", text)


def candidates_are_compared(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if run.dataset.has_candidates:
        return
    ranked = any(metric.startswith("NDCG") for metric in task.metrics or ())
    for parameter, what in [("loss", "pairwise")] * (task.loss == "pairwise") + [("metrics", "NDCG")] * ranked:
        text = f"{what} compares the candidates of a request, and {run.cite(run.dataset, 'max_num_candidates')}"
        yield run.problem(task, parameter, f"{text}; set it above 1, or DatasetArgs.candidates to requests")


def labels_are_hidden(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    dataset = run.dataset
    if not isinstance(dataset, DatasetArgs):
        return
    if task.label in dataset.side_feature_names and task.label not in dataset.known_after:
        text = (
            f"is one of {run.cite(dataset, 'side_feature_names')}, so the prediction would see its own label; add it "
            "to DatasetArgs.known_after"
        )
        yield run.problem(task, "label", text)


def tasks_have_different_names(run: RunConfig) -> Iterator[Problem]:
    seen: set[str] = set()
    for task in tasks_of(run):
        if task.task_name in seen:
            parameter = "name" if task.name else "label"
            text = f"another task is called {task.task_name!r}, too, in metrics; give each task a name of its own"
            yield run.problem(task, parameter, text)
        seen.add(task.task_name)


def _any_of(values: tuple[str, ...]) -> str:
    return " or ".join(map(literal, values))


RULES_OF_A_TASK = (
    kinds_have_their_option, a_condition_stands_alone, loss_fits_the_kind, metrics_fit_the_kind,
    candidates_are_compared, labels_are_hidden,
)  # fmt: skip
RULES = (each_task_is_consistent, tasks_have_different_names)
