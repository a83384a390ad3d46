"""Export a trained model for other tools: weights in one safetensors file, and what is needed to use them.

python scripts/export.py --run_dir runs/quickstart --output exports/quickstart
python scripts/export.py --run_dir runs/quickstart --output exports/quickstart --program
python scripts/export.py --run_dir runs/quickstart --output exports/later --delta exports/quickstart

model.safetensors holds model.<parameter> and model.tables.<table> (moving averages where the run keeps them), and the
raw id of each table row as ids.<feature>. For each dynamic table it holds dynamic.<table>.ids, ascending, and
dynamic.<table>.weight with one row per id; such an id is an index into ids.<feature>.

With --program, the folder "serving" in it has all that a service needs to use the model with plain PyTorch
(docs/export.md). With --delta, the output has this folder alone, and of its tables only the rows that have changed
since an earlier export. A server applies it.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.base.errors import EXIT_DONE
from hstu.base.remote import local_export, relative_path
from hstu.checkpoint.export import export
from hstu.config.cli import tool
from hstu.observe.logging import quiet_libraries
from hstu.serve.command import add_checkpoint_arguments, note, require_model
from hstu.serve.contents import caveats
from hstu.serve.export import TABLE_DTYPES, TOLERANCE, for_export, read_export, write_delta, write_serving
from hstu.serve.loaded import LoadedModel, mesh_of_this_process, stored_config
from hstu.serve.runtime.files import SERVING


def _threshold(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0")
    return value


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--program", action="store_true", help="also write a traced program and what it reads")
    parser.add_argument("--compile", action="store_true", help="also compile the program by g++, for fast answers")
    parser.add_argument(
        "--table_dtype", choices=TABLE_DTYPES, default="float32", help="data type of the program's tables (%(default)s)"
    )
    parser.add_argument("--data", type=Path, help="data of the program's items; default: that of the run")
    parser.add_argument("--delta", type=Path, metavar="BASE", help="write changes since this export with a program")
    parser.add_argument(
        "--delta_threshold",
        type=_threshold,
        default=0.0,
        help="changes of rows up to this are left out (%(default)s: none)",
    )
    options = parser.parse_args(arguments)
    if not (options.program or options.delta) and (options.data or options.compile or options.table_dtype != "float32"):
        parser.error("--table_dtype, --data and --compile belong to --program")
    if options.delta is None and options.delta_threshold:
        parser.error("--delta_threshold belongs to --delta")
    require_model(parser, options)
    quiet_libraries()
    base = None if options.delta is None else read_export(local_export(options.delta))
    config, checkpoint, why = stored_config(options.run_dir or options.ckpt, options.ckpt)
    measured = list[str]()
    for line in why:
        print(f"note: {line}", file=sys.stderr)

    def write_program(directory: Path) -> None:
        loaded = LoadedModel.restore(for_export(config, options.data), checkpoint, mesh_of_this_process())
        note(loaded, *loaded.report, *caveats(config))
        folder = directory / SERVING
        whole = folder if base is None else directory / "whole"
        difference = write_serving(loaded, whole, table_dtype=options.table_dtype, base=base, compiles=options.compile)
        found = "was not compared with the model"
        if difference is not None:
            found = f"differs from the model by at most {difference:.1e} (tolerance {TOLERANCE:g})"
        measured.append(f"program: {found}")
        if base is not None:
            path = relative_path(options.output / SERVING, base.folders[0])
            size = write_delta(whole, base, folder, path, options.delta_threshold)
            shutil.rmtree(whole)
            rows, of_bytes = f"{size.changed:,} of {size.rows:,} rows", f"{size.num_bytes:,} bytes"
            measured.append(f"delta: {rows}, {of_bytes}; a whole export has {size.whole_bytes:,}")

    write_more = write_program if options.program or base is not None else None
    path = export(checkpoint, options.output, write_more, weights=base is None)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    print("\n".join(f"{file.stat().st_size:>14,}  {file}" for file in files))
    for line in measured:
        print(line)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
