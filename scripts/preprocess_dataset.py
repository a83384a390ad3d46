"""Makes the sequence store of a built-in dataset or of your own interactions table (docs/datasets.md).

    python scripts/preprocess_dataset.py --dataset_name ml-1m [--raw_path DIR] [--output tmp_data/ml-1m]
    python scripts/preprocess_dataset.py --dataset_name NAME --interactions FILE... --user COL --item COL
        [--action COL] [--time COL] [--context FILE --context_columns a,b] [--items FILE --item_columns c,d]
        [--event_columns e,f] [--requests FILE... [--request COL]]
    python scripts/preprocess_dataset.py --dataset_name ml-1m --verify

Exit codes: 0 done, 2 bad arguments, 3 bad or missing data, 130 stopped by Ctrl-C, 143 by SIGTERM; then the same command
resumes.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hstu.base.errors import EXIT_DONE, ConfigError, PrintableFormatter, UserError, printable
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.own_columns import matching_files
from hstu.data.datasets.own_types import TIME_UNITS, lists_of
from hstu.data.preprocess import DATA_DIRECTORY, InteractionColumns, import_interactions, preprocess
from hstu.data.preprocess.engine import disk_errors
from hstu.data.preprocess.report import REPORT, check_report_folder, format_report, write_report
from hstu.data.preprocess.starter import write_starters
from hstu.data.store.layout import META_FILE
from hstu.data.store.sequence_store import SequenceStore

_EXIT_SIGNAL = 128
"""Plus the number of the signal, as shells count."""
_FOR_ALL = (
    "output", "force", "memory_limit", "bad_row_policy", "max_bad_rows", "min_user_events", "min_item_events",
    "all_items",
)  # fmt: skip
_COLUMNS = tuple(field.name for field in fields(InteractionColumns))
_OWN_TABLE = (*_COLUMNS, "glob", "append")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    console = logging.StreamHandler()
    console.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[console])
    with _stop_signals() as received:
        try:
            _run(_parser().parse_args(argv))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            if received:  # an interrupted query leaks, about which DuckDB would print at Python's own exit
                os._exit(_EXIT_SIGNAL + received[0])
            return _EXIT_SIGNAL + signal.SIGINT
    return EXIT_DONE


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Lets SIGTERM raise KeyboardInterrupt as Ctrl-C does. Yields the signals received; the second ends at once."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in a background job
            signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> None:
    if args.verify:
        _verify(args)
        return
    if not args.no_report:
        check_report_folder(_report_folder(_target(args)))
    path = _make(args)
    store = SequenceStore.open(path)
    print(printable(format_report(store)))
    if not args.no_report:
        print(f"  report: {_write_report(store, args.force)}")
    with disk_errors(path.parent):
        print("".join(f"  {line}\n" for line in write_starters(store, path)), end="")


def _target(args: argparse.Namespace) -> Path:
    return args.output or DATA_DIRECTORY / (resolve_name(args.dataset_name) or args.dataset_name)


def _report_folder(store: Path) -> Path:
    return store.absolute().with_name(f"{store.name}.report")


def _write_report(store: SequenceStore, force: bool) -> Path:
    """Writes <store>.report/report.md unless it is already newer than the store; returns its path."""
    folder = _report_folder(store.path)
    report = folder / REPORT
    made = (store.path / META_FILE).stat().st_mtime
    if not force and report.is_file() and report.stat().st_mtime >= made:
        return report
    with disk_errors(folder):
        return write_report(store, folder)


def _verify(args: argparse.Namespace) -> None:
    path = _target(args)
    SequenceStore.open(path).verify_contents()
    print(f"{path}: every checksum and every value is right")


def _make(args: argparse.Namespace) -> Path:
    common = {name: getattr(args, name) for name in _FOR_ALL}
    common["raw_ids"] = tuple(name.strip() for name in args.raw_ids.split(",") if name.strip())
    if args.interactions is None:
        misplaced = [f"--{name}" for name in _OWN_TABLE if getattr(args, name) != _parser().get_default(name)]
        if misplaced:
            raise ConfigError(f"{', '.join(misplaced)}: only with --interactions, your own table")
        return preprocess(args.dataset_name, raw_path=args.raw_path, **common)
    if args.raw_path or not args.user or not args.item:
        raise ConfigError("--interactions needs --user and --item, and does not go with --raw_path")
    given = {name: getattr(args, name) for name in _COLUMNS}
    for name in ("interactions", "requests"):
        given[name] = tuple(matching_files(given[name]) if args.glob else map(Path, given[name]))
    return import_interactions(args.dataset_name, InteractionColumns(**given), append=args.append, **common)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dataset_name", required=True, help=f"{', '.join(DATASETS)}, or any other name for your own table")
    add("--raw_path", type=Path, help="directory with the raw files; without it they are downloaded to tmp_data/raw/")
    add("--output", type=Path, help="directory of the store; without it tmp_data/<dataset_name>")
    add("--force", action="store_true", help="replace an existing store; else it is kept if it fits its raw files")
    add("--memory_limit", default="4GB", help="memory for sorting; beyond it, working files beside the store are used")
    add(
        "--bad_row_policy",
        choices=("raise", "skip"),
        default="raise",
        help="raise: the first row that cannot be used ends the run; skip: such rows are skipped and counted",
    )
    add("--max_bad_rows", type=int, default=1000, help="with skip, more bad rows than this end the run all the same")
    add("--min_user_events", type=int, default=1, help="leave out users with fewer events")
    add("--min_item_events", type=int, default=1, help="leave out items with fewer events, until all left have enough")
    add("--all_items", action="store_true", help="items of --items or --titles belong to the data even without events")
    add(
        "--raw_ids",
        default="",
        help="item, user or item,user: models get the raw ids, int64, which dynamic tables take as they are",
    )
    add("--verify", action="store_true", help="only check every checksum and every value of an existing store")
    add("--no_report", action="store_true", help="do not write <output>.report/report.md with its plots")
    _add_own_table(parser.add_argument_group("your own table").add_argument)
    return parser


def _add_own_table(add: Callable[..., argparse.Action]) -> None:
    names: dict[str, Any] = {"type": _names, "default": ()}
    separator: dict[str, Any] = {"type": _separator, "metavar": "TEXT"}
    add(
        "--interactions",
        nargs="+",
        metavar="FILE",
        help="text (also .gz or .zst) or Parquet files, or directories of such files, one row per event",
    )
    add("--glob", action="store_true", help="--interactions and --requests are patterns such as 'day_*.csv'")
    add(
        "--append",
        action="store_true",
        help="add the events of --interactions to the existing store; the raw files that it has must still be there",
    )
    add("--user", help="column of the user, int64 or strings")
    add("--item", help="column of the item, int64 or strings")
    add("--action", help="column of the action, integers >= 0 or a few texts")
    add("--time", help="column of the time, a number since 1970 or a date; without it: order of the rows")
    add("--time_unit", choices=(*TIME_UNITS, "auto"), default="s", help="unit of times that are numbers")
    add(
        "--requests",
        nargs="+",
        default=(),
        metavar="FILE",
        help="files, as of --interactions, with one row per impression, in columns of the same names: what to rank",
    )
    add("--request", help="column of --requests with the id of the request; without it a user's rows of one time")
    add("--split", help="column that says which events are train, valid and test, in this order within a user")
    add("--context", type=Path, help="table with one row per user, with the same user column")
    add(
        "--context_columns", help="columns of --context or of the interactions, as a,b,c; also the user column", **names
    )
    add(
        "--bins",
        type=_numbers,
        default={},
        metavar="COL=N,...",
        help="columns of numbers, of users, items or events → ranges to group them into",
    )
    add("--items", type=Path, help="table with one row per item, with the same item column")
    add("--item_columns", help="columns of --items or of the interactions, as a,b,c", **names)
    add("--event_columns", help="columns of the interactions that are features of the events, as a,b,c", **names)
    add(
        "--lists",
        type=_lists,
        default={},
        metavar="COL=TEXT,...",
        help="item columns with several values → what separates them, as 'genres=|,tags=comma'",
    )
    add("--numbers", help="item or event columns that are quantities, not categories, as price,watch_time", **names)
    add("--vectors", help="item columns that are vectors: lists of Parquet files, or text with --lists", **names)
    add("--titles", type=Path, help="table with one row per item, with the same item column")
    add("--title", help="column of --titles")
    add(
        "--delimiter",
        help="what separates columns, if not a comma in .csv or a tab in .tsv: ';', '::', tab",
        **separator,
    )
    add("--header", help="names of the columns, as a,b,c, if the first line does not name them", **names)
    add("--requests_delimiter", help="as --delimiter, for --requests", **separator)
    add("--requests_header", help="as --header, for --requests", **names)
    add("--context_delimiter", help="as --delimiter, for --context", **separator)
    add("--context_header", help="as --header, for --context", **names)
    add("--titles_delimiter", help="as --delimiter, for --titles", **separator)
    add("--titles_header", help="as --header, for --titles", **names)
    add("--items_delimiter", help="as --delimiter, for --items", **separator)
    add("--items_header", help="as --header, for --items", **names)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> dict[str, int]:
    pairs = [pair.rpartition("=") for pair in _names(text)]
    if not all(name and number.isdecimal() for name, _, number in pairs):
        raise argparse.ArgumentTypeError(f"expected columns and numbers of ranges, as age=10,income=5, not {text!r}")
    return {name: int(number) for name, _, number in pairs}


def _lists(text: str) -> dict[str, str]:
    try:
        return lists_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _separator(text: str) -> str:
    return "\t" if text in ("tab", "\\t") else text


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
