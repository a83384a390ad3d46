"""Rules across parameters, classes and ranks: functions named after what they require, in one file per topic.

A rule receives a RunConfig, which may be incomplete (hstu/config/problems.py), and yields a Problem per mistake or
warning. Entry points add the rules of other packages (``hstu.data.rules``). Fields declare the limits of single values.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field
from typing import Any

from hstu.base.errors import ConfigError
from hstu.config.args import Args
from hstu.config.option import cited, is_given, options_of, problem
from hstu.config.problems import Problem, apply, in_reading_order
from hstu.config.rules import data, task, training
from hstu.config.run_config import RunConfig, RunDraft

Rule = Callable[[RunDraft], Iterator[Problem]]


def given_options_combine(run: RunConfig) -> Iterator[Problem]:
    """Each given option has an effect, and no two given options exclude each other."""
    for part in run.all_args():
        for each in options_of(type(part)):
            yield from apply((_needs_are_met, _is_not_excluded), run, part, each)


def _needs_are_met(run: RunConfig, part: Args, field: Field[Any]) -> Iterator[Problem]:
    origin = part.origins.get(field.name)
    for need in field.metadata["needs"]:
        if not is_given(part, field.name) or need.is_met(run.value_of(part, need.option)):
            continue
        if origin and "/" not in origin.name and sum(type(other) is type(part) for other in run.all_args()) > 1:
            continue  # bound without a scope, as a default for other objects of the class
        if need.option == "task":
            text = f"is for {need.values[0]} and has no effect here: {need.why}; remove it"
        elif need.option == "data":
            text = "has no effect on the random data of BenchmarkDatasetArgs; remove it"
        else:
            other, name = run.find(part, need.option)
            because = f", because {need.why}" if need.why else ""
            remedy = f"remove it, or set {name} to {need.wanted()}"
            text = f"has no effect with {cited(other, name)}{because}; {remedy}"
        yield problem(part, field.name, text, is_warning=not run.must_meet(need))


def _is_not_excluded(run: RunConfig, part: Args, field: Field[Any]) -> Iterator[Problem]:
    for excluded, reason in field.metadata["excludes"].items():
        other, name = run.find(part, excluded)
        if is_given(part, field.name) and is_given(other, name):
            because = f", because {reason}" if reason else ""
            text = f"cannot be combined with {cited(other, name)}{because}; remove one of them"
            yield problem(part, field.name, text)


def parts_are_consistent(run: RunConfig) -> Iterator[Problem]:
    """Each argument object follows the rules of its class, which receive the run and the object."""
    for part in run.all_args():
        for cls, rules in (*training.RULES_OF.items(), *task.RULES_OF.items(), *data.RULES_OF.items()):
            if isinstance(part, cls):
                yield from apply(rules, run, part)


RULES: Sequence[Rule] = (given_options_combine, parts_are_consistent, *training.RULES, *task.RULES, *data.RULES)


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
