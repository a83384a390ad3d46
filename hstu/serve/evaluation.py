"""Compute metrics of a trained model on a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hstu.base.errors import ConfigError
from hstu.config.args import RankingArgs
from hstu.config.args.task import METRICS_OF_KIND, fits_kind
from hstu.config.problems import did_you_mean, in_reading_order
from hstu.config.rules.task import metrics_fit_the_head
from hstu.config.run_config import RunConfig
from hstu.data.sampling.samples import Split
from hstu.serve.loaded import LoadedModel
from hstu.train.builder import build_evaluator
from hstu.train.evaluate import Evaluator, Observations
from hstu.train.inference import InferenceSource


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a model for a split."""

    evaluator: Evaluator
    observations: Observations

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of all predictions; nan for metrics that the data leaves undefined."""
        return self.evaluator.metrics(self.observations)


def evaluate_split(loaded: LoadedModel, split: Split, metrics: Sequence[str] | None = None) -> Evaluation:
    """Predict a split. ``metrics``: replace the configured metrics. Collective."""
    config = loaded.config if metrics is None else with_metrics(loaded.config, metrics)
    source = loaded.with_data()
    evaluator = build_evaluator(config, source, loaded.model, loaded.mesh)
    with loaded.inference():
        return Evaluation(evaluator, evaluator.observe(source.eval_batches(split)))


def choose_split(source: InferenceSource, split: str | None) -> Split:
    """Check the name of a split; None: the last split that training evaluates. Raises ConfigError if unknown."""
    allowed = source.final_splits
    if split is None:
        return allowed[-1]
    for known in allowed:
        if split == known:
            return known
    raise ConfigError(f"the run has no split {split!r}; allowed: {', '.join(allowed)}{did_you_mean(split, allowed)}")


def with_metrics(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Replace the metrics of a configuration. Raises ConfigError for metrics that the task does not have."""
    args = config.task_args
    if not isinstance(args, RankingArgs) or args.tasks is None:
        changed = replace(config, task_args=replace(args, eval_metrics=tuple(names)))
        if problems := list(metrics_fit_the_head(changed)):
            raise ConfigError(in_reading_order(problems))
        return changed
    fitting = {task.task_name: [name for name in names if fits_kind(name.upper(), task.kind)] for task in args.tasks}
    if missing := [name for name in names if not any(name in own for own in fitting.values())]:
        allowed = {metric: None for task in args.tasks for metric in METRICS_OF_KIND[task.kind]}
        raise ConfigError(
            f"metrics: no task of the run has {', '.join(missing)}; allowed: {', '.join(allowed)}"
            f"{did_you_mean(missing[0], allowed)}"
        )
    tasks = [replace(task, metrics=tuple(fitting[task.task_name])) for task in args.tasks if fitting[task.task_name]]
    return replace(config, task_args=replace(args, tasks=tasks))
