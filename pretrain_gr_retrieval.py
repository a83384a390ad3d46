"""Train and evaluate a retrieval model.

torchrun pretrain_gr_retrieval.py --gin-config-file configs/ml_1m_retrieval.gin
"""

import sys

from hstu.config.cli import parse_command_line

if __name__ == "__main__":
    config = parse_command_line("retrieval")  # tells of every mistake before anything heavy is imported
    from hstu.train.main import run

    sys.exit(run(config))
