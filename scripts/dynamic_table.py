"""Export a dynamic table of a checkpoint to Parquet, whole or only its changes since a step or a time, or import it.

python scripts/dynamic_table.py export --ckpt checkpoints/iteration_00001000 --table movie_id --parquet movies.parquet
python scripts/dynamic_table.py export --ckpt checkpoints --table movie_id --parquet new.parquet --since-step 900
python scripts/dynamic_table.py export --ckpt checkpoints --table movie_id --parquet new.parquet --since-time 2026-11-22
python scripts/dynamic_table.py import --ckpt checkpoints --table movie_id --parquet movies.parquet --output edited
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.base.errors import EXIT_DONE
from hstu.checkpoint.find import locate
from hstu.checkpoint.parquet import batch_at, export_table, import_table
from hstu.config.tool import tool
from hstu.observe.logging import quiet_libraries

_NUMBER = re.compile(r"-?\d+(\.\d*)?")
_TIME = "ISO 8601 (2026-11-22T08:30, local; 2026-11-22T08:30Z or …+01:00) or seconds since 1970"


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("export", "import"):
        command = commands.add_parser(name)
        command.add_argument("--ckpt", required=True, help="a checkpoint, or a directory of them (the newest is used)")
        command.add_argument("--table", required=True)
        if name == "export":
            command.add_argument("--parquet", type=Path, required=True, help="file to write")
            since = command.add_mutually_exclusive_group()
            since.add_argument("--since-step", type=int, help="only rows changed after this training batch")
            since.add_argument("--since-time", type=moment, help=f"only rows changed after this time: {_TIME}")
        else:
            command.add_argument(
                "--parquet",
                type=Path,
                required=True,
                nargs="+",
                help="the whole table, then later changes, in order",
            )
            command.add_argument("--output", type=Path, required=True, help="directory for the new checkpoint")
    options = parser.parse_args(arguments)
    quiet_libraries()
    checkpoint = locate(options.ckpt)
    if options.command == "export":
        _export(checkpoint, options.table, options.parquet, options.since_step, options.since_time)
    else:
        print(import_table(checkpoint, options.table, options.parquet, options.output))
    return EXIT_DONE


def moment(text: str) -> float:
    """Return the seconds since 1970 of a time that a user gives. Raises ArgumentTypeError."""
    try:
        return float(text) if _NUMBER.fullmatch(text) else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: give {_TIME}") from error


def _export(checkpoint: Path, table: str, path: Path, since_step: int | None, since_time: float | None) -> None:
    if since_time is not None:
        found = batch_at(checkpoint, table, since_time)
        given = f"since {_local(since_time)}"
        if found is None:
            print(f"{given}: the log of {table} starts later, so all rows are written")
        else:
            since_step = found[1]
            print(f"{given}: since batch {since_step:,}, the last one in the log at that time ({_local(found[0])})")
    ids, step = export_table(checkpoint, table, path, since_step)
    print(f"{ids:,} ids of {table} in {path}; export later changes with --since-step {step}")


def _local(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):  # before the year 1
        return f"{seconds} s"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
