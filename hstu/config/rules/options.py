"""Checks the declared needs and exclusions of options.

Options that exclude each other are an error. An option without effect is a warning, or an error with ``Need.strict``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field
from typing import Any

from hstu.config.args import Args
from hstu.config.incomplete import apply
from hstu.config.option import is_given, options_of
from hstu.config.problems import Problem
from hstu.config.run_config import RunConfig


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
            text = f"has no effect with {run.cite(other, name)}{because}; {remedy}"
        yield run.problem(part, field.name, text, is_warning=not need.strict)


def _is_not_excluded(run: RunConfig, part: Args, field: Field[Any]) -> Iterator[Problem]:
    for excluded, reason in field.metadata["excludes"].items():
        other, name = run.find(part, excluded)
        if is_given(part, field.name) and is_given(other, name):
            because = f", because {reason}" if reason else ""
            text = f"cannot be combined with {run.cite(other, name)}{because}; remove one of them"
            yield run.problem(part, field.name, text)


RULES = (given_options_combine,)
