"""Measure how long runs of two ranks take to end after a fault: ``python -m tests.reliability.times``.

Prints the seconds from the fault to the end of the last rank, the exit codes, and the last commit. Runs save every two
iterations.
"""

import sys
import tempfile
from pathlib import Path

from tests.conftest import write_small_store
from tests.distributed.test_failures import failed_at
from tests.reliability.test_background import run
from tests.train.tiny import walks

TIMEOUT_S = 10
EVENTS = {
    "a loss that is nan at iteration 7": ("no number", 7),
    f"a rank stuck at iteration 7, collective_timeout_s = {TIMEOUT_S}": ("asleep over a batch", 7),
    "a rank killed at iteration 7": ("killed", 7),
    "a full disk on one rank, saving iteration 6": ("refused", 6),
    "SIGTERM at iteration 7": ("SIGTERM", 7),
}


def main() -> int:
    """Print one line for each fault, with saves in the foreground and in the background."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        write_small_store(Path(store), **walks(31))
        for number, (event, (fault, iteration)) in enumerate(EVENTS.items()):
            for background in (False, True):
                output = Path(folder) / f"{number}{background}"
                trainer = {"max_train_iters": 1000, "ckpt_async": background, "collective_timeout_s": TIMEOUT_S}
                ranks = run(2, store, output, fault, iteration, **trainer)
                taken = max(rank.at for rank in ranks) - failed_at(output)
                committed = sorted(path.name for path in (output / "checkpoints").glob("iteration_*"))
                how = "in the background" if background else "waiting"
                print(f"{event}, {how}: {taken:.1f} s, exit codes {[rank.exit_code for rank in ranks]};", end=" ")
                print(f"the last commit is {committed[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
