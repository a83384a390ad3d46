"""Checks that need more than one value: across parameters, classes and the number of ranks. Imports no torch."""

from __future__ import annotations

from hstu.config.errors import ConfigError
from hstu.config.problems import in_reading_order
from hstu.config.rule_engine import Run
from hstu.config.rules import advice, rule
from hstu.config.run_config import RunConfig


def validate(config: RunConfig, world_size: int) -> list[str]:
    """Raises ConfigError with everything that does not fit together; returns warnings, one line each."""
    run = Run(config.task, world_size, config.parts(), config.origins)
    problems = rule.apply(run)
    if problems:
        raise ConfigError(in_reading_order(problems))
    return in_reading_order(advice.apply(run))
