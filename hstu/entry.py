"""The entry scripts and their console commands: parse → validate → build → train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hstu.config.args import Task
from hstu.config.cli import parse_command_line
from hstu.config.rules import RULES, Rule
from hstu.config.run_config import RunConfig
from hstu.data.rules import DATA_RULES
from hstu.observe.environment import check_packages, let_idle_threads_sleep

if TYPE_CHECKING:
    from hstu.parallel.mesh import Mesh


def train(task: Task) -> int:
    """Train with the configuration of the command line. Returns the exit code."""
    config = parse_command_line(task, rules=(*RULES, *DATA_RULES), preflight=preflight)
    let_idle_threads_sleep()
    from hstu.train.main import run  # imports torch: only after the configuration is checked

    return run(config, beside_tables)


train_ranking = partial(train, "ranking")
train_retrieval = partial(train, "retrieval")
"""The console commands hstu-train-ranking and hstu-train-retrieval."""


def preflight() -> Sequence[Rule]:
    """The additional checks of --validate-only, which import all packages."""
    check_packages()
    from hstu.estimate.validate import what_the_file_names_fits

    return (what_the_file_names_fits,)


def beside_tables(config: RunConfig, mesh: Mesh) -> int:
    """Estimate the GPU bytes of a train step without the tables. The planner gives the rest to the tables."""
    from hstu.estimate import estimate, workload

    planned = workload.plan_workload(config, mesh.world_size, mesh.local_world_size, mesh.device.type)
    return estimate.beside_tables(planned)


if __name__ == "__main__":
    task: Task = "ranking" if sys.argv.pop(1) == "ranking" else "retrieval"
    sys.exit(train(task))
