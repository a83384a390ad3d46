"""Makes the sequence store of a built-in dataset or of your own interactions table (docs/datasets.md).

    python scripts/preprocess_dataset.py --dataset_name ml-1m [--raw_path DIR] [--output tmp_data/ml-1m]
    python scripts/preprocess_dataset.py --dataset_name NAME --interactions FILE.csv|tsv|parquet --user COL --item COL
        [--action COL] [--time COL] [--context FILE --context_columns a,b]
    python scripts/preprocess_dataset.py --dataset_name ml-1m --verify

Exit codes: 0 done, 2 bad arguments, 3 bad or missing data, 130 stopped with Ctrl-C; the same command resumes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hstu.config.errors import EXIT_DONE, ConfigError, UserError
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.preprocess import DATA_DIRECTORY, InteractionColumns, import_interactions, preprocess
from hstu.data.preprocess.engine import disk_errors
from hstu.data.preprocess.report import REPORT, format_report, write_report
from hstu.data.preprocess.starter import write_starters
from hstu.data.store import META_FILE, SequenceStore

_EXIT_INTERRUPTED = 130
_OWN_TABLE_ONLY = ("user", "item", "action", "time", "context", "context_columns")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = _parser().parse_args(argv)
        if args.verify:
            _verify(args)
        else:
            path = _run(args)
            store = SequenceStore.open(path)
            print(format_report(store))
            if not args.no_report:
                print(f"  report: {_write_report(store, args.force)}")
            with disk_errors(path.parent):
                print("".join(f"  {line}\n" for line in write_starters(store, path)), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return _EXIT_INTERRUPTED
    return EXIT_DONE


def _write_report(store: SequenceStore, force: bool) -> Path:
    """Writes <store>.report/report.md unless it is already newer than the store; returns its path."""
    folder = store.path.with_name(f"{store.path.name}.report")
    report = folder / REPORT
    made = (store.path / META_FILE).stat().st_mtime
    if not force and report.is_file() and report.stat().st_mtime >= made:
        return report
    with disk_errors(folder):
        return write_report(store, folder)


def _verify(args: argparse.Namespace) -> None:
    path = args.output or DATA_DIRECTORY / (resolve_name(args.dataset_name) or args.dataset_name)
    SequenceStore.open(path).verify_contents()
    print(f"{path}: every checksum and every value is right")


def _run(args: argparse.Namespace) -> Path:
    common = {
        name: getattr(args, name) for name in ("output", "force", "memory_limit", "bad_row_policy", "max_bad_rows")
    }
    if args.interactions is None:
        misplaced = [f"--{name}" for name in _OWN_TABLE_ONLY if getattr(args, name)]
        if misplaced:
            raise ConfigError(f"{', '.join(misplaced)}: only with --interactions, your own table")
        return preprocess(args.dataset_name, raw_path=args.raw_path, **common)
    if args.raw_path or not args.user or not args.item:
        raise ConfigError("--interactions needs --user and --item, and does not go with --raw_path")
    columns = InteractionColumns(
        interactions=args.interactions,
        user=args.user,
        item=args.item,
        action=args.action,
        time=args.time,
        context=args.context,
        context_columns=tuple(name.strip() for name in args.context_columns.split(",") if name.strip()),
    )
    return import_interactions(args.dataset_name, columns, **common)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dataset_name", required=True, help=f"{', '.join(DATASETS)}, or any other name for your own table")
    add("--raw_path", type=Path, help="directory with the raw files; without it they are downloaded to tmp_data/raw/")
    add("--output", type=Path, help="directory of the store; without it tmp_data/<dataset_name>")
    add("--force", action="store_true", help="replace an existing store")
    add("--memory_limit", default="4GB", help="memory for sorting; beyond it, working files beside the store are used")
    add(
        "--bad_row_policy",
        choices=("raise", "skip"),
        default="raise",
        help="raise: the first row that cannot be used ends the run; skip: such rows are skipped and counted",
    )
    add("--max_bad_rows", type=int, default=1000, help="with skip, more bad rows than this end the run all the same")
    add("--verify", action="store_true", help="only check every checksum and every value of an existing store")
    add("--no_report", action="store_true", help="do not write <output>.report/report.md with its plots")
    own = parser.add_argument_group("your own table")
    own.add_argument("--interactions", type=Path, help="CSV, TSV (also gzipped) or Parquet file, one row per event")
    own.add_argument("--user", help="column of the user, int64 or strings")
    own.add_argument("--item", help="column of the item, int64 or strings")
    own.add_argument("--action", help="column of the action, integers >= 0")
    own.add_argument("--time", help="column of the time, seconds since 1970 or dates; without it: order of the rows")
    own.add_argument("--context", type=Path, help="table with one row per user, with the same user column")
    own.add_argument("--context_columns", default="", help="columns of --context, as a,b,c; also the user column")
    return parser


if __name__ == "__main__":
    sys.exit(main())
