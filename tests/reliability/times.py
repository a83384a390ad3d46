"""How long runs of two ranks take to end when something happens: ``python -m tests.reliability.times``.

Seconds from the event to the end of the last rank, the exit codes, and what is committed then. Checkpoints every two
iterations.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.conftest import write_small_store
from tests.distributed.launch import run_to_their_ends
from tests.distributed.test_failures import HERE as FAILURES
from tests.distributed.test_failures import case, failed_at
from tests.reliability.test_background import HERE, asked
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
    """Prints a line for each event, waiting for checkpoints and with them in the background."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        write_small_store(Path(store), **walks(31))
        for number, (event, (deed, iteration)) in enumerate(EVENTS.items()):
            for background in (False, True):
                output = Path(folder) / f"{number}{background}"
                trainer = {"max_train_iters": 1000, "ckpt_async": background, "collective_timeout_s": TIMEOUT_S}
                if deed in ("refused", "SIGTERM"):
                    given = asked(store, output, at=iteration, **trainer) | {"deeds": {"1": deed}}
                    ranks = run_to_their_ends(HERE, 2, 120, **given)
                else:
                    ranks = run_to_their_ends(
                        f"{FAILURES}:run_with", 2, 120, **case(store, output, {1: deed}, iteration, **trainer)
                    )
                taken = max(rank.at for rank in ranks) - failed_at(output)
                committed = sorted(path.name for path in (output / "checkpoints").glob("iteration_*"))
                how = "in the background" if background else "waiting"
                print(f"{event}, {how}: {taken:.1f} s, exit codes {[rank.exit_code for rank in ranks]};", end=" ")
                print(f"the last commit is {committed[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
