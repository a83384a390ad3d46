"""Raw text and Parquet files: as SQL relations for DuckDB, and checks that explain what is wrong with a file."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from hstu.base.errors import DataError

MAX_REJECTED_LINES = 10_000
"""DuckDB stores at most this many unreadable lines per file."""
_SNIFFED_BYTES = 1 << 16
_COPIED_BYTES = 1 << 22
_SIGNATURES = (
    (b"\x1f\x8b", "gzip-compressed; unpack it, or let its name end in .gz"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"BZh", "bzip2-compressed; unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it, or let its name end in .zst"),
    (b"\xfd7zXZ", "xz-compressed; unpack it"),
    (b"PAR1", "a Parquet file; let its name end in .parquet"),
    (b"SQLite format 3", "a SQLite database; export the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook; save the sheet as CSV"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""End of a name → how the text in the file is compressed."""
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


def identifier(name: str) -> str:
    """A column name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string quoted for SQL."""
    return "'" + text.replace("'", "''") + "'"


def select_list(columns: Mapping[str, str]) -> str:
    """SQL that picks columns: new name → column."""
    return ", ".join(f"{identifier(column)} AS {identifier(name)}" for name, column in columns.items())


def rating_and_time(scale: int, time: str) -> str:
    """SQL of an action and times from columns ``rating`` and ``time``.

    A rating that is 0, or not whole after scaling, becomes NULL, which the check of the rows refuses.
    """
    whole = f"rating * {scale} = floor(rating * {scale}) AND rating > 0 AND rating <= 1000"
    action = f"CASE WHEN {whole} THEN CAST(rating * {scale} AS INTEGER) END"
    return f'{action} AS action, {time} AS "time", {time} AS "timestamp"'


def one_file(file: Path) -> str:
    """SQL literal by which DuckDB reads this file alone. It takes unescaped ``*``, ``?`` and ``[`` as a pattern."""
    return literal(re.sub(r"[*?\[]", r"[\g<0>]", str(file.absolute())))


def parquet_rows(file: Path, *, numbered: bool = False) -> str:
    """SQL of the rows of one Parquet file, with ``file_row_number`` if ``numbered``.

    Without hive_partitioning, a folder named ``user=5`` does not replace a column.
    """
    number = ", file_row_number = true" if numbered else ""
    return f"read_parquet({one_file(file)}, hive_partitioning = false{number})"


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """A table in a file: Parquet, or delimited UTF-8 text, compressed if its name ends in .gz or .zst.

    Nothing is guessed from the data: a value of another type makes its line unreadable, an empty value is NULL.
    """

    path: Path
    columns: Mapping[str, str] | None = None
    """Name → SQL type of all columns of a text file, in order. None for Parquet, which stores its own types."""
    delimiter: str = ","
    header: bool = True
    quote: str = '"'

    @property
    def is_text(self) -> bool:
        """Whether rows are lines."""
        return self.columns is not None

    def relation(self) -> str:
        """SQL of the rows in order. Unreadable lines are left out and listed in DuckDB's table reject_errors."""
        if self.columns is None:
            return parquet_rows(self.path)
        described = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in self.columns.items())
        compression = COMPRESSIONS.get(self.path.suffix, "none")  # "?" in a name confuses DuckDB's own guess
        return (
            f"read_csv([{one_file(self.path)}], auto_detect = false, columns = {{{described}}}, "
            f"delim = {literal(self.delimiter)}, header = {str(self.header).lower()}, quote = {literal(self.quote)}, "
            f"escape = {literal(self.quote)}, hive_partitioning = false, compression = {literal(compression)}, "
            f"store_rejects = true, rejects_limit = {MAX_REJECTED_LINES})"
        )

    def place(self, row: int) -> str:
        """Location of readable row ``row`` (from 0): ``file:line``, or ``file, row n`` for Parquet."""
        return f"{self.path}:{self._line_of(row)}" if self.is_text else f"{self.path}, row {row + 1}"

    def line_at(self, byte: int) -> int:
        """Line of a byte of the uncompressed text; line breaks at that byte are skipped."""
        with open_bytes(self.path) as stream:
            line, left = 1, byte
            while left and (block := stream.read(min(left, 1 << 20))):
                line, left = line + block.count(b"\n"), left - len(block)
            while (character := stream.read(1)) in (b"\r", b"\n") and character:
                line += character == b"\n"
        return line

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
    """A file's bytes, decompressed if its name ends in .gz or .zst. Raises DataError where it cannot be read."""
    try:
        with _opened(file) as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"there is no file {file}") from None
    except IsADirectoryError:
        raise DataError(f"{file} is a directory; name the file in it") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip raises EOFError where the file is cut off
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot read {file}: {reason}") from error


def _opened(file: Path) -> IO[bytes]:
    if COMPRESSIONS.get(file.suffix) == "gzip":
        return cast(IO[bytes], gzip.open(file))
    if COMPRESSIONS.get(file.suffix) == "zstd":
        import pyarrow  # not above, because the registry of datasets is read without NumPy

        return cast(IO[bytes], pyarrow.CompressedInputStream(str(file), "zstd"))
    return file.open("rb")


@contextmanager
def open_text(file: Path) -> Iterator[IO[str]]:
    """A file's text with its line breaks; bytes that are not UTF-8 are replaced. Raises DataError as open_bytes."""
    with open_bytes(file) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def write_with_uniform_lines(file: Path, target: Path) -> None:
    """Copies a text file uncompressed, with LF at the end of every line."""
    with open_bytes(file) as source, target.open("wb") as copy:
        held = b""  # a CR at the end of a block may belong to a CR LF
        while block := source.read(_COPIED_BYTES):
            block = held + block
            held = b"\r" if block.endswith(b"\r") else b""
            block = block.removesuffix(held) if held else block
            copy.write(block.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        copy.write(held.replace(b"\r", b"\n"))


def _ends_of_rows(lines: IO[str], delimiter: str, quote: str) -> Iterator[tuple[int, int]]:
    """(first, last) line of each row, from 1. Blank lines are skipped; only quoted values span lines."""
    if not quote or len(delimiter) > 1:
        yield from ((number, number) for number, line in enumerate(lines, 1) if line.strip("\r\n"))
        return
    reader, last = csv.reader(lines, delimiter=delimiter, quotechar=quote), 0
    for row in reader:
        first, last = last + 1, reader.line_num
        if row:
            yield first, last


def table_with_header(file: Path, types: Mapping[str, str], *, delimiter: str = ",") -> RawFile:
    """A delimited file whose header has all columns of ``types``; its other columns are text. Else DataError."""
    header = header_columns(file, delimiter)
    require_columns(file, header, types)
    columns = {name: types.get(name, "VARCHAR") for name in header}
    return RawFile(path=file, columns=columns, delimiter=delimiter, quote=quote_beside(delimiter))


def quote_beside(delimiter: str) -> str:
    """Quote character of a file; none where several characters separate the columns, as in MovieLens."""
    return '"' if len(delimiter) == 1 else ""


def probable_delimiter(line: str) -> str | None:
    """The most frequent delimiter in a line; None where it has none of the usual ones."""
    if "::" in line:
        return "::"
    other = max(";\t|,:", key=line.count)
    return other if other in line else None


def header_columns(file: Path, delimiter: str) -> list[str]:
    """Column names in the first line of a delimited file. Raises DataError where they are unusable."""
    try:
        with open_text(file) as lines:
            if len(delimiter) > 1:  # without quotes
                header = next(lines, "").rstrip("\r\n").split(delimiter)
                header = header if header != [""] else []
            else:
                header = next(csv.reader(lines, delimiter=delimiter), [])
    except csv.Error as error:
        raise DataError(f"{file}:1: {error}") from error
    if not header:
        raise DataError(f"{file}:1: the first line is empty; it must name the columns")
    if len(header) == 1 and (other := probable_delimiter(header[0])) and other != delimiter:
        raise DataError(
            f"{file}:1: columns must be separated by {delimiter!r}, these seem to be by {other!r} (--delimiter): "
            f"{header[0][:80]!r}"
        )
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{file}:1: the first line must name every column once, it is: {', '.join(header)}")
    return header


def require_columns(file: Path, present: Sequence[str], wanted: Iterable[str]) -> None:
    """Raises DataError with the columns that a file lacks and has, and a suggestion for the first missing one."""
    missing = [column for column in wanted if column not in present]
    if not missing:
        return
    near = difflib.get_close_matches(missing[0], present, n=1)
    near = near or [name for name in present if name.strip().lower() == missing[0].lower()]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    columns = f"column {missing[0]!r}" if len(missing) == 1 else f"columns {', '.join(map(repr, missing))}"
    raise DataError(f"{file} has no {columns}.{hint} It has: {', '.join(present)}")


def check_readable(raw: RawFile) -> None:
    """Raises DataError if the file is missing, empty, or not what its name and RawFile state."""
    file = raw.path
    with open_bytes(file) as stream:
        head = stream.read(_SNIFFED_BYTES)
    if not head:
        raise DataError(f"{file} is empty")
    if raw.is_text:
        _check_text(raw, head)
    elif not head.startswith(b"PAR1"):
        raise DataError(f"{file} is not a Parquet file, although its name ends in .parquet")


def _check_text(raw: RawFile, head: bytes) -> None:
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            raise DataError(f"{raw.path} is {what}")
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{raw.path} is a web page, perhaps an error message instead of the download; get it again")
    if b"\0" in head:
        line = head.count(b"\n", 0, head.index(0)) + 1
        raise DataError(f"{raw.path}:{line}: a zero byte; this is not a text file, or a damaged one")
    if not raw.header:
        _check_columns_of_first_line(raw, head)


def _check_columns_of_first_line(raw: RawFile, head: bytes) -> None:
    assert raw.columns is not None
    line = head.splitlines()[0].decode("utf-8", errors="replace")
    found, expected = len(line.split(raw.delimiter)), len(raw.columns)
    if found == 1 < expected:
        raise DataError(
            f"{raw.path}:1: expected {expected} columns ({', '.join(raw.columns)}) separated by {raw.delimiter!r}, "
            f"found {line[:80]!r}"
        )
