"""The entry scripts and their console commands: parse → validate → build → train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from hstu.config.args import Task
from hstu.config.cli import parse_command_line
from hstu.config.rules import RULES, Rule
from hstu.data.rules import DATA_RULES
from hstu.observe.environment import check_packages, let_idle_threads_sleep


def train(task: Task) -> int:
    """Train with the configuration of the command line. Returns the exit code."""
    config = parse_command_line(task, rules=(*RULES, *DATA_RULES), preflight=preflight)
    let_idle_threads_sleep()
    from hstu.estimate.estimate import beside_tables_of_run  # imports torch: only after the configuration is checked
    from hstu.train.main import run

    return run(config, beside_tables_of_run)


train_ranking = partial(train, "ranking")
train_retrieval = partial(train, "retrieval")
"""The console commands hstu-train-ranking and hstu-train-retrieval."""


def preflight() -> Sequence[Rule]:
    """The additional checks of --validate-only, which import all packages."""
    check_packages()
    from hstu.estimate.validate import what_the_file_names_fits

    return (what_the_file_names_fits,)


if __name__ == "__main__":
    task: Task = "ranking" if sys.argv.pop(1) == "ranking" else "retrieval"
    sys.exit(train(task))
