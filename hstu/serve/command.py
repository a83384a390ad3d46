"""What the commands that apply a model share: the arguments that name it, and the files and times that people give."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hstu.base.errors import DataError
from hstu.base.files import replace_text
from hstu.serve.loaded import LoadedModel

M = TypeVar("M", bound=LoadedModel)
_SHOWN = 10


def add_model_arguments(parser: argparse.ArgumentParser, *, has_data: bool = True) -> None:
    """Add --run_dir, --checkpoint, --partial and, with ``has_data``, --data."""
    add = parser.add_argument
    add("--run_dir", type=Path, help="directory of a run")
    add(
        "--checkpoint",
        "--ckpt",
        help="checkpoint, directory of checkpoints (the newest is used), or export; default: those of the run",
    )
    add("--partial", action="store_true", help="load what fits of the checkpoint, and report the rest")
    if has_data:
        add("--data", type=Path, help="preprocessed data to apply the model to; default: that of the run")


def require_model(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program with a usage error if no model is named."""
    if options.run_dir is None and options.checkpoint is None:
        parser.error("give --run_dir, --checkpoint or both")


def load_model(cls: type[M], options: argparse.Namespace) -> M:
    """Load the model that the arguments name, and report on standard error what did not fit. Collective."""
    path, strict = options.run_dir or options.checkpoint, False if options.partial else None
    loaded = cls.load(path, options.checkpoint, strict=strict, data=getattr(options, "data", None))
    note(loaded, *loaded.report)
    return loaded


def note(loaded: LoadedModel, *lines: str) -> None:
    """Print notes on standard error, on one rank."""
    if loaded.mesh.is_main:
        for line in lines:
            print(f"note: {line}", file=sys.stderr)


def note_unknown(loaded: LoadedModel, file: str, unknown: Mapping[str, Sequence[Any]]) -> None:
    """Say which ids of a file the data does not know, by column."""
    for column, ids in unknown.items():
        if ids:
            note(loaded, f"{file}: {len(ids)} unknown {column}(s) left out: {shown(ids)}")


def shown(values: Sequence[Any]) -> str:
    """The first of some values."""
    return ", ".join(map(repr, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")


def read_text(file: str) -> str:
    """The text of a file, or of standard input for "-", with any kind of line ends. Raises DataError."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def parse_json(text: str, where: str) -> Any:
    """The value that JSON text describes. Raises DataError, which names ``where``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def read_ids(file: str) -> list[str]:
    """Raw ids of a file: one per line, or a list in a .json; "-" is standard input. Raises DataError."""
    text = read_text(file)
    if not file.endswith(".json"):
        return [line for line in text.split("\n") if line]
    ids = parse_json(text, file)
    if not isinstance(ids, list) or not all(isinstance(each, (str, int)) for each in ids):
        raise DataError(f"{file}: expected a list of ids, strings or whole numbers")
    return list(map(str, ids))


def parse_time(text: str) -> int:
    """Seconds since 1970 of --at. Raises DataError."""
    if text == "now":
        return int(time.time())
    try:
        return int(text)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(
            f"--at: {text!r} is no time; give now, seconds since 1970, or a date such as 2026-01-31T18:00"
        ) from None
    return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())


def check_new(path: Path) -> None:
    """Raise DataError if an output exists."""
    if path.exists():
        raise DataError(f"{path} exists; give another name, or remove it")


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises DataError."""
    try:
        replace_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
