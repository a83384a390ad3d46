"""Train and evaluate a ranking model.

torchrun pretrain_gr_ranking.py --gin-config-file configs/ml_1m_ranking.gin
"""

import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

from hstu.config.cli import parse_command_line
from hstu.config.rules import RULES, Rule
from hstu.data.rules import DATA_RULES
from hstu.observe.environment import check_packages, let_idle_threads_sleep


def preflight() -> Sequence[Rule]:
    """The checks of --validate-only, which need all packages."""
    check_packages()
    from hstu.estimate.preflight import PREFLIGHT_RULES

    return PREFLIGHT_RULES


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config = parse_command_line("ranking", rules=(*RULES, *DATA_RULES), preflight=preflight)
    let_idle_threads_sleep()
    from hstu.train.main import run  # after the configuration is checked, because it imports torch

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
