"""Raw text and Parquet files as SQL relations for DuckDB, which reads them in parallel and bounded memory."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hstu.config.errors import DataError


def identifier(name: str) -> str:
    """A column name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string quoted for SQL."""
    return "'" + text.replace("'", "''") + "'"


def read_text(files: Sequence[Path], columns: Mapping[str, str], *, delimiter: str, header: bool, quote: str) -> str:
    """A relation over text files one after another, in row order. ``columns``: name -> SQL type, all columns.

    Nothing is guessed from the data: a value that is not of its type is an error, an empty one is NULL.
    """
    described = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in columns.items())
    paths = ", ".join(literal(str(file)) for file in files)
    return (
        f"read_csv([{paths}], auto_detect = false, columns = {{{described}}}, delim = {literal(delimiter)}, "
        f"header = {str(header).lower()}, quote = {literal(quote)}, escape = {literal(quote)})"
    )


def read_table_with_header(files: Sequence[Path], types: Mapping[str, str], *, delimiter: str = ",") -> str:
    """A relation over delimited files that share a header line. Columns not in ``types`` are text."""
    headers = [header_columns(file, delimiter) for file in files]
    for file, header in zip(files, headers, strict=True):
        if header != headers[0]:
            raise DataError(f"{file} has other columns than {files[0]}: {', '.join(header)}")
        require_columns(file, header, types)
    columns = {name: types.get(name, "VARCHAR") for name in headers[0]}
    return read_text(files, columns, delimiter=delimiter, header=True, quote='"')


def header_columns(file: Path, delimiter: str) -> list[str]:
    """Column names of a delimited file's first line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines, delimiter=delimiter), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if not header:
        raise DataError(f"{file} is empty; its first line must name the columns")
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{file}: its first line must name every column once, it is: {', '.join(header)}")
    return header


def require_columns(file: Path, present: Sequence[str], wanted: Iterable[str]) -> None:
    """Raises DataError that names the first column that a file lacks, what it has, and the nearest name."""
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{file} has no column {column!r}.{hint} It has: {', '.join(present)}")
