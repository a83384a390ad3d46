"""Rules across parameters, classes and ranks: functions named after what they require, in one file per topic.

A rule receives a RunConfig, which may be incomplete (hstu/config/incomplete.py), and yields a Problem per mistake or
warning. Entry points add the rules of other packages (``hstu.data.rules``). Fields declare the limits of single values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from hstu.base.errors import ConfigError
from hstu.config.incomplete import apply
from hstu.config.problems import Problem, in_reading_order
from hstu.config.rules import data, options, ranking_tasks, task, training
from hstu.config.run_config import RunConfig, RunDraft

Rule = Callable[[RunDraft], Iterator[Problem]]

RULES: Sequence[Rule] = (*options.RULES, *training.RULES, *task.RULES, *ranking_tasks.RULES, *data.RULES)


def validate(config: RunConfig, world_size: int, rules: Iterable[Rule] = RULES) -> list[str]:
    """Applies ``rules`` to a complete configuration. Returns warnings, one line each; raises ConfigError."""
    return check(RunDraft(**vars(config), world_size=world_size), rules)


def check(draft: RunDraft, rules: Iterable[Rule], found: Iterable[Problem] = ()) -> list[str]:
    """Applies ``rules`` to a draft and returns warnings, one line each.
    Raises ConfigError with all mistakes, including problems ``found`` earlier, and the warnings."""
    problems = [*found, *apply(rules, draft)]
    warnings = in_reading_order(problem for problem in problems if problem.is_warning)
    if mistakes := [problem for problem in problems if not problem.is_warning]:
        raise ConfigError(in_reading_order(mistakes), warnings)
    return warnings
