"""Scripts of the repository in processes that are forked from one that has the imports done (launch.py).

What starts a script for users, python and torchrun, is a matter of test_entry_scripts.py.
"""

import os
import runpy
import sys
from typing import Any

import torch

from tests.distributed.launch import Launch, run_to_their_ends

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_script(*command: Any, ranks: int | None = None, timeout_s: float = 150.0) -> tuple[list[int], str]:
    """The exit code of each rank, and the output of all. ``ranks``: None for a script without a launcher."""
    words = [str(word) for word in command]
    ended = run_to_their_ends(Launch(ranks or 1, timeout_s), as_main, words, launched=ranks is not None)
    return [rank.exit_code for rank in ended], "".join(rank.output for rank in ended)


def as_main(command: list[str], launched: bool) -> None:
    """Be the script, with one thread."""
    for name in LAUNCHERS if not launched else ():
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
