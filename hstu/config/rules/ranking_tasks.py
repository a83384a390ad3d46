"""Rules about RankingArgs.tasks: what each kind of task needs and allows, and labels that are also inputs."""
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Iterator

from hstu.config.args import DatasetArgs, RankingArgs, RankingTaskArgs
from hstu.config.args.task import LOSSES, METRICS_OF_KIND, fits_kind
from hstu.config.incomplete import apply
from hstu.config.option import is_given
from hstu.config.problems import Problem, did_you_mean, literal
from hstu.config.run_config import RunConfig

_OF_KINDS = {
    "positive_from": ("binary",),
    "positive_values": ("binary",),
    "bit_mask": ("binary",),
    "num_classes": ("class", "ordinal"),
    "scale": ("regression",),
}
"""Option of a task → the kinds in which it has an effect."""
_POSITIVE = ("positive_from", "positive_values", "bit_mask")
"""The options that say which labels of a binary task are positive."""


def tasks_of(run: RunConfig) -> list[RankingTaskArgs]:
    """The tasks that a ranking run defines; empty if there are none."""
    return (run.task_args.tasks or []) if isinstance(run.task_args, RankingArgs) else []


def each_task_is_consistent(run: RunConfig) -> Iterator[Problem]:
    for task in tasks_of(run):
        yield from apply(RULES_OF_A_TASK, run, task)


def options_fit_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    for parameter, kinds in _OF_KINDS.items():
        if is_given(task, parameter) and task.kind not in kinds:
            text = f"has no effect with {run.cite(task, 'kind')}; remove it, or set kind to {_any_of(kinds)}"
            yield run.problem(task, parameter, text)
    if task.kind in _OF_KINDS["num_classes"] and task.num_classes is None:
        yield run.problem(task, "kind", "needs RankingTaskArgs.num_classes; bind it under the scope of this task")


def positives_have_one_definition(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    first, *others = [name for name in _POSITIVE if getattr(task, name) is not None] or [""]
    for other in others:
        yield run.problem(task, first, f"cannot be combined with {run.cite(task, other)}; remove one of them")


def loss_fits_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if task.loss is not None and task.loss not in LOSSES[task.kind]:
        text = f"is not for {run.cite(task, 'kind')}; use {_any_of(LOSSES[task.kind])}"
        yield run.problem(task, "loss", text)


def metrics_fit_the_kind(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    for metric in task.metrics or ():
        if not fits_kind(metric, task.kind):
            text = f"{metric} is not for {run.cite(task, 'kind')}; use {_any_of(METRICS_OF_KIND[task.kind])}"
            yield run.problem(task, "metrics", text)


def pairs_are_of_candidates(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if task.loss == "pairwise" and not run.dataset.has_candidates:
        yield run.problem(task, "loss", _without_candidates(run, "pairwise"))


def ranked_are_candidates(run: RunConfig, task: RankingTaskArgs) -> Iterator[Problem]:
    if any(metric.startswith("NDCG") for metric in task.metrics or ()) and not run.dataset.has_candidates:
        yield run.problem(task, "metrics", _without_candidates(run, "NDCG"))


def _without_candidates(run: RunConfig, what: str) -> str:
    cited = run.cite(run.dataset, "max_num_candidates")
    remedy = "set it above 1, or DatasetArgs.candidates to requests"
    return f"{what} compares the candidates of a request, and {cited}; {remedy}"


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


def tasks_replace_those_of_the_action(run: RunConfig) -> Iterator[Problem]:
    if isinstance(ranking := run.task_args, RankingArgs) and ranking.tasks is not None:
        instead = {"num_tasks": "one RankingTaskArgs per task", "eval_metrics": "RankingTaskArgs.metrics"}
        for parameter, other in instead.items():
            if is_given(ranking, parameter):
                text = f"cannot be combined with {run.cite(ranking, 'tasks')}; use {other}"
                yield run.problem(ranking, parameter, text)


def experts_have_tasks(run: RunConfig) -> Iterator[Problem]:
    if not isinstance(ranking := run.task_args, RankingArgs):
        return
    if is_given(ranking, "task_sharing") and ranking.tasks is None:
        yield run.problem(ranking, "task_sharing", "has no effect without RankingArgs.tasks; remove it")
    if is_given(ranking, "num_experts") and ranking.task_sharing == "shared":
        text = f"has no effect with {run.cite(ranking, 'task_sharing')}; remove it, or set task_sharing to mmoe or ple"
        yield run.problem(ranking, "num_experts", text)


def measured_by(run: RunConfig) -> list[str]:
    """The metrics of all tasks, as "AUC/click"."""
    return [f"{metric}/{task.task_name}" for task in tasks_of(run) for metric in task.metrics_in_force]


def best_metric_is_that_of_a_task(run: RunConfig) -> Iterator[Problem]:
    trainer, tasks = run.trainer, tasks_of(run)
    if tasks and trainer.best_metric is not None and trainer.best_metric not in measured_by(run):
        text = f"is not measured; choose one of {', '.join(measured_by(run))}, or add it to RankingTaskArgs.metrics"
        yield run.problem(trainer, "best_metric", text + did_you_mean(trainer.best_metric, measured_by(run)))


def _any_of(values: tuple[str, ...]) -> str:
    return " or ".join(map(literal, values))


RULES_OF_A_TASK = (
    options_fit_the_kind, positives_have_one_definition, loss_fits_the_kind, metrics_fit_the_kind,
    pairs_are_of_candidates, ranked_are_candidates, labels_are_hidden,
)  # fmt: skip
RULES = (
    each_task_is_consistent, tasks_have_different_names, tasks_replace_those_of_the_action, experts_have_tasks,
    best_metric_is_that_of_a_task,
)  # fmt: skip
