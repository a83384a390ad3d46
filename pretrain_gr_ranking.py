"""Train and evaluate a ranking model.

torchrun pretrain_gr_ranking.py --gin-config-file configs/ml_1m_ranking.gin
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

from hstu.entry import train_ranking

if __name__ == "__main__":
    sys.exit(train_ranking())
