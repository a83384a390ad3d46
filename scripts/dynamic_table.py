"""Dynamic tables of a checkpoint to Parquet, whole or what has changed since a step, and back.

python scripts/dynamic_table.py export --ckpt checkpoints/iteration_00001000 --table movie_id --parquet movies.parquet
python scripts/dynamic_table.py export --ckpt checkpoints --table movie_id --parquet new.parquet --since-step 900
python scripts/dynamic_table.py import --ckpt checkpoints --table movie_id --parquet movies.parquet --output edited
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.checkpoint.describe import locate
from hstu.checkpoint.dynamic_parquet import export_table, import_table
from hstu.config.errors import EXIT_DONE, UserError
from hstu.observe.logging import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("export", "import"):
        command = commands.add_parser(name)
        command.add_argument("--ckpt", required=True, help="a checkpoint, or a directory of them (the newest is taken)")
        command.add_argument("--table", required=True)
        command.add_argument("--parquet", type=Path, required=True)
        if name == "export":
            command.add_argument("--since-step", type=int, default=0, help="only rows changed after this batch")
        else:
            command.add_argument("--output", type=Path, required=True, help="directory for the new checkpoint")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        checkpoint = locate(options.ckpt)
        if options.command == "export":
            count = export_table(checkpoint, options.table, options.parquet, options.since_step)
            print(f"{count:,} ids of {options.table} in {options.parquet}")
        else:
            print(import_table(checkpoint, options.table, options.parquet, options.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
