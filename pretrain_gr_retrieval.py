"""Train and evaluate a retrieval model.

torchrun pretrain_gr_retrieval.py --gin-config-file configs/ml_1m_retrieval.gin
"""

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

from hstu.config.cli import parse_command_line
from hstu.config.rules import RULES, Rule
from hstu.config.run_config import RunConfig
from hstu.data.rules import DATA_RULES
from hstu.observe.environment import check_packages, let_idle_threads_sleep

if TYPE_CHECKING:
    from hstu.parallel.mesh import Mesh


def preflight() -> Sequence[Rule]:
    """The checks of --validate-only, which need all packages."""
    check_packages()
    from hstu.estimate.preflight import PREFLIGHT_RULES

    return PREFLIGHT_RULES


def beside_tables(config: RunConfig, mesh: "Mesh") -> int:
    """The estimated bytes of a step beside the tables, which are planned for the rest of a GPU's memory."""
    from hstu.estimate.memory import beside_tables_of_run

    return beside_tables_of_run(config, mesh)


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config = parse_command_line("retrieval", rules=(*RULES, *DATA_RULES), preflight=preflight)
    let_idle_threads_sleep()
    from hstu.train.main import run  # after the configuration is checked, because it imports torch

    return run(config, beside_tables)


if __name__ == "__main__":
    sys.exit(main())
