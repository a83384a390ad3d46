"""Inspect a checkpoint or an export, or verify its files.

python scripts/inspect_checkpoint.py runs/quickstart
python scripts/inspect_checkpoint.py checkpoints/a/iteration_00000100 --verify

Exit codes: 0 on success, 3 for a damaged or missing checkpoint.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.base.errors import EXIT_DONE
from hstu.checkpoint.directory import check_files
from hstu.checkpoint.export import describe
from hstu.checkpoint.find import locate
from hstu.config.cli import tool
from hstu.observe.logging import quiet_libraries


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, a directory of them (the newest is used), or an export")
    parser.add_argument("--verify", action="store_true", help="read every file and compare checksums")
    parser.add_argument("--optimizer", action="store_true", help="name each state of the optimizers")
    options = parser.parse_args(arguments)
    quiet_libraries()
    root = locate(options.checkpoint)
    if options.verify:
        files = check_files(root, f"{root} is damaged")
        print(f"{root}: {len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes, all as written")
    else:
        print("\n".join(describe(root, options.optimizer)))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
