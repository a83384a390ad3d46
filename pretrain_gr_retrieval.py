"""Train and evaluate a retrieval model.

torchrun pretrain_gr_retrieval.py --gin-config-file configs/ml_1m_retrieval.gin
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

from hstu.entry import train_retrieval

if __name__ == "__main__":
    sys.exit(train_retrieval())
