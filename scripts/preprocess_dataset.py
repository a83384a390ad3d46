"""Makes the sequence store of a built-in dataset or of your own interactions table (docs/datasets.md).

    python scripts/preprocess_dataset.py --dataset_name ml-1m [--raw_path DIR] [--output tmp_data/ml-1m]
    python scripts/preprocess_dataset.py --dataset_name NAME --interactions FILE... --user COL --item COL
        [--action COL] [--time COL] [--context FILE --context_columns a,b] [--items FILE --item_columns c,d]
        [--event_columns e,f] [--requests FILE... [--request COL]]
    python scripts/preprocess_dataset.py --dataset_name NAME --interactions FILE --sequences
        [--items FILE.json --item_columns attributes]
    python scripts/preprocess_dataset.py --dataset_name NAME --interactions NAME.inter
    python scripts/preprocess_dataset.py --dataset_name NAME --interactions NEW... --append, and the options as before
    python scripts/preprocess_dataset.py --dataset_name NAME --forget users.txt
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
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hstu.base.errors import EXIT_DONE, ConfigError, DataError, PrintableFormatter, UserError, printable
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.own_columns import SEPARATORS
from hstu.data.preprocess import DATA_DIRECTORY, InteractionColumns, forget, import_interactions, preprocess
from hstu.data.preprocess.report import format_report
from hstu.data.preprocess.starter import write_starters
from hstu.data.preprocess.state import BuildOptions, disk_errors
from hstu.data.store.layout import META_FILE
from hstu.data.store.meta import MALFORMED, remedy
from hstu.data.store.sequence_store import SequenceStore

_EXIT_SIGNAL = 128
"""Plus the number of the signal, as shells count."""
_FOR_ALL = ("output", *(option.name for option in fields(BuildOptions) if option.metadata))
_COLUMNS = tuple(field.name for field in fields(InteractionColumns))
_WITH_FORGET = ("help", "dataset_name", "output", "forget", "memory_limit", "quick")
_OWN_TABLE = (*_COLUMNS, "append")


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
        SequenceStore.open(path := _target(args)).verify_contents()
        print(f"{path}: every checksum and every value is right")
        return
    path = _make(args)
    store = SequenceStore.open(path)
    try:
        print(printable(format_report(store)))
    except MALFORMED as error:
        raise DataError(f"{path / META_FILE} is incomplete ({error!r}). {remedy(path, None)}") from error
    with disk_errors(path.parent):
        print("".join(f"  {line}\n" for line in write_starters(store, path, args.quick)), end="")


def _target(args: argparse.Namespace) -> Path:
    return args.output or DATA_DIRECTORY / (resolve_name(args.dataset_name) or args.dataset_name)


def _make(args: argparse.Namespace) -> Path:
    common = {name: getattr(args, name) for name in _FOR_ALL}
    if args.forget:
        others = [option for option in _parser()._actions if option.dest not in _WITH_FORGET]
        given = [
            f"--{action.dest}" for action in others if getattr(args, action.dest, action.default) != action.default
        ]
        if given:
            raise ConfigError(f"--forget changes a store, and does not go with {', '.join(given)}")
        return forget(args.dataset_name, args.forget, output=args.output, memory_limit=args.memory_limit)
    if args.interactions is None:
        misplaced = [f"--{name}" for name in _OWN_TABLE if getattr(args, name) != _parser().get_default(name)]
        if misplaced:
            raise ConfigError(f"{', '.join(misplaced)}: only with --interactions, your own table")
        return preprocess(args.dataset_name, raw_path=args.raw_path, **common)
    if args.raw_path:
        raise ConfigError("--interactions, your own table, does not go with --raw_path")
    columns = InteractionColumns.of({name: getattr(args, name) for name in _COLUMNS})
    return import_interactions(args.dataset_name, columns, append=args.append, **common)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dataset_name", required=True, help=f"{', '.join(DATASETS)}, or any other name for your own table")
    add("--raw_path", type=Path, help="directory with the raw files; without it they are downloaded to tmp_data/raw/")
    add("--output", type=Path, help="directory of the store; without it tmp_data/<dataset_name>")
    _add_options(add, BuildOptions)
    add("--forget", type=Path, metavar="FILE", help="only remove the users of a text file, one raw id a line")
    add("--verify", action="store_true", help="only check every checksum and every value of an existing store")
    add("--quick", action="store_true", help="write starter files of a small model, 500 iterations, for a first look")
    add = parser.add_argument_group("your own table").add_argument
    _add_options(add, InteractionColumns)
    add(
        "--append",
        action="store_true",
        help="add the events of --interactions to the existing store, which needs its earlier raw files no more",
    )
    return parser


def _add_options(add: Callable[..., argparse.Action], of: type[BuildOptions] | type[InteractionColumns]) -> None:
    """One option per field of a class that says what it means."""
    kinds: dict[str, dict[str, Any]] = {
        "Path | Sequence[Path]": {"type": Path, "nargs": "+", "metavar": "FILE"},
        "tuple[Path, ...]": {"type": Path, "nargs": "+", "default": (), "metavar": "FILE"},
        "tuple[str, ...]": {"type": _names, "default": ()},
        "Mapping[str, int]": {"type": _ranges, "default": {}, "metavar": "COL=N,..."},
        "Mapping[str, str]": {"type": _lists, "default": {}, "metavar": "COL=TEXT,..."},
        "Path | None": {"type": Path},
        "str | None": {"type": _separator},
        "int": {"type": int},
        "bool": {"action": "store_true"},
    }
    for option in (option for option in fields(of) if option.metadata):
        default = {} if option.default in (MISSING, None) else {"default": option.default}
        add(f"--{option.name}", **{**kinds.get(str(option.type), {}), **default, **option.metadata})


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _ranges(text: str) -> dict[str, int]:
    pairs = [pair.rpartition("=") for pair in _names(text)]
    if not all(name and number.isdecimal() for name, _, number in pairs):
        raise argparse.ArgumentTypeError(f"expected columns and numbers of ranges, as age=10,income=5, not {text!r}")
    return {name: int(number) for name, _, number in pairs}


def _lists(text: str) -> dict[str, str]:
    pairs = [pair.rpartition("=") for pair in text.split(",") if pair.strip()]
    if not all(column.strip() and separator for column, _, separator in pairs) or text.endswith(","):
        raise argparse.ArgumentTypeError(
            f"expected columns and separators, as genres=|,tags=;, or the words {', '.join(SEPARATORS)}, not {text!r}"
        )
    return {column.strip(): SEPARATORS.get(separator, separator) for column, _, separator in pairs}


def _separator(text: str) -> str:
    return "\t" if text in ("tab", "\\t") else text


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
