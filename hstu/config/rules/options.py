"""Options that have no effect without another one, or that exclude another one: what their declarations say.

An option without effect is a warning, because the run is what the file says. It is an error where two given options
contradict each other, or where the user expects another run (``Need.strict``).
"""

from __future__ import annotations

from collections.abc import Iterator

from hstu.config.args import Args
from hstu.config.incomplete import apply
from hstu.config.option import Need, is_given, options_of
from hstu.config.problems import Problem
from hstu.config.run_config import RunConfig


def needs_are_met(run: RunConfig) -> Iterator[Problem]:
    """Each option that is given has an effect."""
    for part in run.all_args():
        for each in options_of(type(part)):
            for need in each.metadata["needs"]:
                yield from apply([_need_is_met], run, part, each.name, need)


def given_options_combine(run: RunConfig) -> Iterator[Problem]:
    """No option is given beside one that it excludes."""
    for part in run.all_args():
        for each in options_of(type(part)):
            for other, reason in each.metadata["excludes"].items():
                yield from apply([_not_combined], run, part, each.name, other, reason)


def _need_is_met(run: RunConfig, part: Args, parameter: str, need: Need) -> Iterator[Problem]:
    if not is_given(part, parameter) or need.is_met(run.value_of(part, need.option)):
        return
    others = [] if need.strict else _with_the_same(run, part, parameter)
    if any(need.is_met(run.value_of(other, need.option)) for other in others):
        return  # bound without a scope, for those
    because = f", because {need.why}" if need.why else ""
    if need.option == "task":
        text = f"is for {need.values[0]} and has no effect here: {need.why}; remove it"
    elif need.option == "data":
        text = "has no effect on the random data of BenchmarkDatasetArgs; remove it"
    else:
        other, name = run.find(part, need.option)
        remedy = f"remove it, or set {name} to {need.wanted()}"
        text = f"has no effect with {run.cite(other, name)}{because}; {remedy}"
    yield run.problem(part, parameter, text, is_warning=not need.strict)


def _with_the_same(run: RunConfig, part: Args, parameter: str) -> list[Args]:
    """The other objects of the class that have the same value."""
    others = (other for other in run.all_args() if type(other) is type(part) and other is not part)
    return [other for other in others if getattr(other, parameter) == getattr(part, parameter)]


def _not_combined(run: RunConfig, part: Args, parameter: str, excluded: str, reason: str) -> Iterator[Problem]:
    other, name = run.find(part, excluded)
    if is_given(part, parameter) and is_given(other, name):
        because = f", because {reason}" if reason else ""
        text = f"cannot be combined with {run.cite(other, name)}{because}; remove one of them"
        yield run.problem(part, parameter, text)


RULES = (given_options_combine, needs_are_met)
