"""Export a trained model for tools outside: weights in one safetensors file, and what names them.

python scripts/export.py --ckpt runs/quickstart/checkpoints --output exports/quickstart

model.safetensors has model.<parameter> and model.tables.<table> (moving averages where the run keeps them), the raw
ids of the tables' rows as ids.<feature>, and of each dynamic table dynamic.<table>.ids, ascending, with
dynamic.<table>.weight, a row for each of them: an id is a code, a place in ids.<feature>.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.checkpoint.describe import locate
from hstu.checkpoint.export import export
from hstu.config.errors import EXIT_DONE, UserError
from hstu.observe.logging import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or a directory of them (the newest is taken)")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        path = export(locate(options.ckpt), options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    files = sorted(file for file in path.rglob("*") if file.is_file())
    print("\n".join(f"{file.stat().st_size:>14,}  {file}" for file in files))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
