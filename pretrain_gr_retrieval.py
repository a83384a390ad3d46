"""Train and evaluate a retrieval model.

torchrun pretrain_gr_retrieval.py --gin-config-file configs/ml_1m_retrieval.gin
"""

import sys

from hstu.config.cli import parse_command_line
from hstu.config.rules import RULES
from hstu.data.rules import DATA_RULES


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config = parse_command_line("retrieval", rules=(*RULES, *DATA_RULES))  # before anything slow is imported
    from hstu.train.main import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
