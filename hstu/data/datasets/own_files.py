"""The files of users' own tables: which ones a pattern or a directory means, how each is read, and its columns."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.raw import (
    COMPRESSIONS,
    RawFile,
    check_readable,
    open_text,
    probable_delimiter,
    quote_beside,
    table_with_header,
)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that match shell patterns: pattern after pattern, numbers in names in the order of numbers."""
    found: list[Path] = []
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True), key=_with_numbers)
        if not names:
            raise DataError(f"--glob: no file matches {pattern}")
        found += [Path(name) for name in names]
    return list(dict.fromkeys(found))


def all_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files, in place of a directory those in it."""
    return tuple(file for path in paths for file in (_files_in(path) if path.is_dir() else [path]))


def _files_in(directory: Path) -> list[Path]:
    """The files of a directory whose names say what they hold; numbers in names in the order of numbers."""
    endings = (*_DELIMITERS, *(f"{text}{end}" for text in _DELIMITERS for end in COMPRESSIONS), ".parquet")
    files = [file for file in directory.iterdir() if file.name.endswith(endings) and not file.name.startswith(".")]
    if not files:
        raise DataError(
            f"{directory} is a directory without files that end in {', '.join(endings)}; name the files, or give a "
            "pattern with --glob"
        )
    return sorted(files, key=lambda file: _with_numbers(file.name))


def _with_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def open_table(file: Path, delimiter: str | None, header: Sequence[str]) -> RawFile:
    """The table of a file, whose header is read. ``header``: its columns, where the file does not name them."""
    name = file.stem if file.suffix in COMPRESSIONS else file.name
    suffix = Path(name).suffix
    if suffix == ".parquet" and name == file.name:
        if header:
            raise ConfigError(f"{file}: a Parquet file has names of its columns; leave out --header")
        table = RawFile(path=file)
        check_readable(table)
        return table
    delimiter = delimiter or _DELIMITERS.get(suffix)
    if delimiter is None:
        check_readable(RawFile(path=file, columns={}))
        raise ConfigError(_unknown_delimiter(file))
    columns = dict.fromkeys(header, "VARCHAR")
    table = RawFile(path=file, columns=columns, delimiter=delimiter, header=not header, quote=quote_beside(delimiter))
    check_readable(table)
    return table if header else table_with_header(file, {}, delimiter=delimiter)


def _unknown_delimiter(file: Path) -> str:
    with open_text(file) as lines:
        found = probable_delimiter(next(lines, ""))
    guess = {None: "for example --delimiter ';'", "\t": "it seems to be --delimiter tab"}
    probably = guess.get(found, f"it seems to be --delimiter {found!r}")
    return (
        f"{file}: say what separates its columns, {probably}. It is known only of files whose name ends in .csv, .tsv "
        f"(perhaps with {' or '.join(COMPRESSIONS)}) or .parquet"
    )


def columns_of(table: RawFile) -> dict[str, str]:
    """Column → SQL type."""
    if table.columns is not None:
        return dict(table.columns)
    try:
        with duckdb.connect() as engine:
            described = engine.execute(f"DESCRIBE SELECT * FROM {table.relation()}").fetchall()
    except duckdb.Error as error:
        raise DataError(f"{table.path} is a damaged Parquet file: {str(error).splitlines()[0]}") from error
    return {row[0]: row[1] for row in described}
