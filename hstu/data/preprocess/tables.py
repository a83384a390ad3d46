"""Raw text and Parquet files as SQL relations for DuckDB, which reads them in parallel and bounded memory."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from hstu.config.errors import DataError

MAX_REJECTED_LINES = 10_000
"""DuckDB remembers at most this many unreadable lines of a file."""


def identifier(name: str) -> str:
    """A column name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string quoted for SQL."""
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """A table in a file: Parquet, or delimited UTF-8 text, perhaps gzipped (the name then ends in .gz).

    ``columns``: of text, name -> SQL type of all columns in their order; of Parquet None, it knows them itself.
    Nothing is guessed from the data: a value that is not of its type makes its line unreadable, an empty one is NULL.
    """

    path: Path
    columns: Mapping[str, str] | None = None
    delimiter: str = ","
    header: bool = True
    quote: str = '"'

    @property
    def is_text(self) -> bool:
        """Whether rows are lines."""
        return self.columns is not None

    def relation(self) -> str:
        """SQL of its rows in their order. Lines that cannot be read are left out and noted in reject_errors."""
        if self.columns is None:
            return f"read_parquet({literal(str(self.path))})"
        described = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in self.columns.items())
        return (
            f"read_csv([{literal(str(self.path))}], auto_detect = false, columns = {{{described}}}, "
            f"delim = {literal(self.delimiter)}, header = {str(self.header).lower()}, quote = {literal(self.quote)}, "
            f"escape = {literal(self.quote)}, store_rejects = true, rejects_limit = {MAX_REJECTED_LINES})"
        )

    def place(self, row: int) -> str:
        """Where row ``row`` (from 0, of the readable ones) stands: ``file:line``, of Parquet ``file, row n``."""
        return f"{self.path}:{self._line_of(row)}" if self.is_text else f"{self.path}, row {row + 1}"

    def place_at(self, byte: int) -> str:
        """``file:line`` of the text at a byte, counted before compression; line breaks there are passed over."""
        with open_bytes(self.path) as stream:
            line, left = 1, byte
            while left and (block := stream.read(min(left, 1 << 20))):
                line, left = line + block.count(b"\n"), left - len(block)
            while (character := stream.read(1)) in (b"\r", b"\n") and character:
                line += character == b"\n"
        return f"{self.path}:{line}"

    def _line_of(self, row: int) -> int:
        with open_text(self.path) as lines:
            ends = _ends_of_rows(lines, self.delimiter, self.quote)
            if self.header:
                next(ends, None)
            start = 1
            for number, (first, _) in enumerate(ends):
                start = first
                if number == row:
                    break
        return start


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed where its name ends in .gz; what cannot be read is a DataError."""
    try:
        with cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"there is no file {file}") from None
    except IsADirectoryError:
        raise DataError(f"{file} is a directory; name the file in it") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip raises EOFError where the file is cut off
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot read {file}: {reason}") from error


@contextmanager
def open_text(file: Path) -> Iterator[IO[str]]:
    """As open_bytes, as text with its line breaks; what is not UTF-8 is replaced."""
    with open_bytes(file) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def _ends_of_rows(lines: IO[str], delimiter: str, quote: str) -> Iterator[tuple[int, int]]:
    """(first, last) line of each row, from 1. Blank lines are no rows; only quoted values span lines."""
    if not quote or len(delimiter) > 1:
        yield from ((number, number) for number, line in enumerate(lines, 1) if line.strip("\r\n"))
        return
    reader, last = csv.reader(lines, delimiter=delimiter, quotechar=quote), 0
    for row in reader:
        first, last = last + 1, reader.line_num
        if row:
            yield first, last


def table_with_header(file: Path, types: Mapping[str, str], *, delimiter: str = ",") -> RawFile:
    """A delimited file whose first line names its columns, which are text unless in ``types``; all of these it has."""
    header = header_columns(file, delimiter)
    require_columns(file, header, types)
    return RawFile(path=file, columns={name: types.get(name, "VARCHAR") for name in header}, delimiter=delimiter)


def header_columns(file: Path, delimiter: str) -> list[str]:
    """Column names of a delimited file's first line."""
    try:
        with open_text(file) as lines:
            header = next(csv.reader(lines, delimiter=delimiter), [])
    except csv.Error as error:
        raise DataError(f"{file}:1: {error}") from error
    if not header:
        raise DataError(f"{file}:1: the first line is empty; it must name the columns")
    if len(header) == 1:
        other = max(";\t|,:", key=header[0].count)
        if header[0].count(other):
            raise DataError(
                f"{file}:1: columns must be separated by {delimiter!r}, these seem to be by {other!r}: "
                f"{header[0][:80]!r}"
            )
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{file}:1: the first line must name every column once, it is: {', '.join(header)}")
    return header


def require_columns(file: Path, present: Sequence[str], wanted: Iterable[str]) -> None:
    """Raises DataError that names the columns that a file lacks, what it has, and the nearest name of the first."""
    missing = [column for column in wanted if column not in present]
    if not missing:
        return
    near = difflib.get_close_matches(missing[0], present, n=1)
    near = near or [name for name in present if name.strip().lower() == missing[0].lower()]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    columns = f"column {missing[0]!r}" if len(missing) == 1 else f"columns {', '.join(map(repr, missing))}"
    raise DataError(f"{file} has no {columns}.{hint} It has: {', '.join(present)}")
