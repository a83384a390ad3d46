"""Export a dynamic table of a checkpoint to Parquet, whole or only its changes since a step.

python scripts/dynamic_table.py export --ckpt checkpoints/iteration_00001000 --table movie_id --parquet movies.parquet
python scripts/dynamic_table.py export --ckpt checkpoints --table movie_id --parquet new.parquet --since-step 900
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
from hstu.checkpoint.export import export_table
from hstu.checkpoint.find import locate
from hstu.config.cli import tool
from hstu.observe.logging import quiet_libraries


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or a directory of them (the newest is used)")
    parser.add_argument("--table", required=True)
    parser.add_argument("--parquet", type=Path, required=True, help="file to write")
    parser.add_argument("--since-step", type=int, help="only rows changed after this training batch")
    options = parser.parse_args(arguments)
    quiet_libraries()
    ids, step = export_table(locate(options.ckpt), options.table, options.parquet, options.since_step)
    print(f"{ids:,} ids of {options.table} in {options.parquet}; export later changes with --since-step {step}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
