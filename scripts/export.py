"""Export a trained model for other tools: weights in one safetensors file, and what is needed to use them.

python scripts/export.py --ckpt runs/quickstart/checkpoints --output exports/quickstart

model.safetensors holds model.<parameter> and model.tables.<table> (moving averages where the run keeps them), and the
raw id of each table row as ids.<feature>. For each dynamic table it holds dynamic.<table>.ids, ascending, and
dynamic.<table>.weight with one row per id; such an id is an index into ids.<feature>.
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

from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.config.errors import EXIT_DONE
from hstu.config.tool import tool
from hstu.observe.logging import quiet_libraries


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or a directory of them (the newest is used)")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    options = parser.parse_args(arguments)
    quiet_libraries()
    path = export(locate(options.ckpt), options.output)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    print("\n".join(f"{file.stat().st_size:>14,}  {file}" for file in files))
    return EXIT_DONE


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
