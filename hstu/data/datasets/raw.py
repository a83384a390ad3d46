"""Raw text and Parquet files as SQL relations for DuckDB, and checks of the files."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, cast

from hstu.base.errors import DataError
from hstu.config.problems import nearest

MAX_REJECTED_LINES = 10_000
"""DuckDB stores at most this many unreadable lines per file."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""File name suffix → compression of the text."""
_SNIFFED_BYTES = 1 << 16
_RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")


def identifier(name: str) -> str:
    """A column name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string quoted for SQL."""
    return "'" + text.replace("'", "''") + "'"


def as_number(value: str) -> str:
    """SQL: DOUBLE of a number, which may have blanks around it, else NULL. DuckDB alone would read 5_0 as 50."""
    return f"CASE WHEN NOT contains(CAST({value} AS VARCHAR), '_') THEN TRY_CAST({value} AS DOUBLE) END"


def as_integer(name: str) -> str:
    """SQL: BIGINT of an int64 in canonical decimal notation, else NULL."""
    integer = f"TRY_CAST({name} AS BIGINT)"
    return f"CASE WHEN CAST({integer} AS VARCHAR) = CAST({name} AS VARCHAR) THEN {integer} END"


def select_list(columns: Mapping[str, str]) -> str:
    """SQL select list from new name → column."""
    return ", ".join(f"{identifier(column)} AS {identifier(name)}" for name, column in columns.items())


def rating_and_time(scale: int, time: str) -> str:
    """Select list of action and times. Ratings that are 0 or fractional after scaling become NULL, hence bad rows."""
    whole = f"rating * {scale} = floor(rating * {scale}) AND rating > 0 AND rating <= 1000"
    action = f"CASE WHEN {whole} THEN CAST(rating * {scale} AS INTEGER) END"
    return f'{action} AS action, {time} AS "time", {time} AS "timestamp"'


def one_file(file: Path) -> str:
    """SQL literal of a path. ``*``, ``?`` and ``[`` are escaped, because DuckDB expands them as a pattern."""
    return literal(re.sub(r"[*?\[]", r"[\g<0>]", str(file.absolute())))


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """A Parquet or text table. A value of another type than declared makes its line unreadable; empty means NULL."""

    path: Path
    columns: Mapping[str, str] | None = None
    """Name → SQL type of all columns of a text file, in order. None: a Parquet file, which stores its own types."""
    delimiter: str = ","
    header: bool = True
    quote: str = '"'
    encoding: str = "utf-8"

    def relation(self) -> str:
        """SQL of the rows in order. Unreadable lines are left out and listed in DuckDB's table reject_errors."""
        if self.columns is None:  # without hive_partitioning, a folder named user=5 does not replace a column
            return f"read_parquet({one_file(self.path)}, hive_partitioning = false)"
        described = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in self.columns.items())
        compression = COMPRESSIONS.get(self.path.suffix, "none")  # "?" in a name confuses DuckDB's own guess
        return (
            f"read_csv([{one_file(self.path)}], auto_detect = false, columns = {{{described}}}, "
            f"delim = {literal(self.delimiter)}, header = {str(self.header).lower()}, quote = {literal(self.quote)}, "
            f"escape = {literal(self.quote)}, hive_partitioning = false, compression = {literal(compression)}, "
            f"encoding = {literal(self.encoding)}, store_rejects = true, rejects_limit = {MAX_REJECTED_LINES})"
        )

    def place(self, row: int) -> str:
        """Location of readable row ``row`` (from 0): ``file:line``, or ``file, row n`` for Parquet."""
        if self.columns is None:
            return f"{self.path}, row {row + 1}"
        with open_text(self.path) as lines:
            line = next(islice(self._lines_of_rows(lines), row + self.header, None), 1)
        return f"{self.path}:{line}"

    def _lines_of_rows(self, lines: IO[str]) -> Iterator[int]:
        """Number of each row's first line, from 1. Blank lines are skipped; only quoted values span lines."""
        if not self.quote:
            yield from (number for number, line in enumerate(lines, 1) if line.strip("\r\n"))
            return
        reader, last = csv.reader(lines, delimiter=self.delimiter, quotechar=self.quote), 0
        for row in reader:
            if row:
                yield last + 1
            last = reader.line_num

    def line_at(self, byte: int) -> int:
        """Line number at a byte offset of the uncompressed text. Line breaks at the offset are skipped."""
        with open_bytes(self.path) as stream:
            line, left = 1, byte
            while left and (block := stream.read(min(left, 1 << 20))):
                line, left = line + block.count(b"\n"), left - len(block)
            while (character := stream.read(1)) in (b"\r", b"\n") and character:
                line += character == b"\n"
        return line


@dataclass(frozen=True, kw_only=True)
class SequenceFile(RawFile):
    """Text with one line per user, ``user item item …``, or per event, ``user item``: if half of the lines have two
    ids, and half of them a user of an earlier line. Each item becomes a row of the two ``columns`` and ``is_usable``:
    whether no earlier line is the user's, or the event's line has no third id. A line without items has a NULL item."""

    delimiter: str = " "

    @property
    def _id(self) -> str:
        return rf"[^{re.escape(self.delimiter)} \t\r\n]+"

    def relation(self) -> str:
        """SQL of the rows, as that of a table."""
        user, item = map(identifier, self.columns or ())
        rows = RawFile(path=self.path, columns={"ids": "VARCHAR"}, delimiter="\x1f", header=False, quote="").relation()
        ids = f"SELECT row_number() OVER () AS line, regexp_extract_all(ids, {literal(self._id)}) AS ids FROM {rows}"
        first = "row_number() OVER (PARTITION BY ids[1] ORDER BY line) = 1"
        users = f"SELECT line, ids, {first} AS is_first FROM ({ids}) WHERE len(ids) > 0"
        of_events = "2 * least(count_if(len(ids) = 2) OVER (), count_if(NOT is_first) OVER ()) >= count(*) OVER ()"
        usable = f"CASE WHEN {of_events} THEN len(ids) <= 2 ELSE is_first END AS is_usable"
        items = "unnest(CASE WHEN len(ids) > 1 THEN ids[2:] ELSE [NULL] END)"
        lines = f"SELECT ids, {usable} FROM ({users}) ORDER BY line"
        return f"(SELECT ids[1] AS {user}, {items} AS {item}, is_usable FROM ({lines}))"

    def _lines_of_rows(self, lines: IO[str]) -> Iterator[int]:
        for number, line in enumerate(lines, 1):
            ids = len(re.findall(self._id, line))
            yield from [number] * max(ids - 1, min(ids, 1))


@dataclass(frozen=True, kw_only=True)
class ListsFile(RawFile):
    """JSON ``{"item": [value, …], …}``, held in memory. ``names``: the columns of the items and of their lists."""

    names: Sequence[str]

    def relation(self) -> str:
        """SQL of the rows. A value that is no list makes the file unreadable."""
        item, values = map(identifier, self.names)
        return (
            f"(SELECT pair.key AS {item}, pair.value AS {values} FROM (SELECT unnest(map_entries(pairs)) AS pair FROM "
            f"read_json([{one_file(self.path)}], columns = {{pairs: 'MAP(VARCHAR, VARCHAR[])'}}, records = false, "
            f"format = 'unstructured', compression = 'none', maximum_object_size = {self.path.stat().st_size})))"
        )


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Open a file's bytes, decompressed if its name ends in .gz or .zst. Raises DataError if it is unreadable."""
    import pyarrow  # imported here, so that the registry of datasets needs no NumPy

    if not file.is_file():
        raise DataError(f"{file} is a directory; name the file in it" if file.is_dir() else f"there is no file {file}")
    try:
        with pyarrow.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix)) as stream:
            yield cast(IO[bytes], stream)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


@contextmanager
def open_text(file: Path) -> Iterator[IO[str]]:
    """Open a file's text and keep line breaks. Replaces bytes that are not UTF-8. Raises DataError as open_bytes."""
    with open_bytes(file) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def table_with_header(file: Path, types: Mapping[str, str]) -> RawFile:
    """Read a CSV header. Columns outside ``types`` are text. Raises DataError if a column of ``types`` is missing."""
    header = [*typed_header(file, ",")]
    require_columns(file, header, types)
    return RawFile(path=file, columns={name: types.get(name, "VARCHAR") for name in header})


def quote_beside(delimiter: str) -> str:
    """Quote character for a delimiter; none for delimiters of several characters, as in MovieLens."""
    return '"' if len(delimiter) == 1 else ""


def probable_delimiter(file: Path) -> str:
    """Guess the delimiter from the first line: "::", else the most frequent of the usual ones, or else ":"."""
    with open_text(file) as lines:
        line = next(lines, "")
    usual = max(",\t;|", key=line.count)
    return "::" if "::" in line else usual if usual in line else ":"


def typed_header(file: Path, delimiter: str) -> dict[str, str]:
    """Column name in the first line → its type of RecBole, which is empty unless all columns have one. Raises
    DataError if the names are unusable."""
    try:
        with open_text(file) as lines:
            if quote_beside(delimiter):
                header = next(csv.reader(lines, delimiter=delimiter), [])
            else:
                header = next(lines, "").rstrip("\r\n").split(delimiter)
    except csv.Error as error:
        raise DataError(f"{file}:1: {error}") from error
    typed, kinds = [name.rpartition(":") for name in header], [""] * len(header)
    if all(kind in _RECBOLE_TYPES for _, _, kind in typed):
        header, kinds = [name for name, _, _ in typed], [kind for _, _, kind in typed]
    if not any(header):
        raise DataError(f"{file}:1: the first line is empty; it must name the columns")
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{file}:1: the first line must name every column once, it is: {', '.join(header)}")
    return dict(zip(header, kinds, strict=True))


def require_columns(file: Path, present: Sequence[str], wanted: Iterable[str]) -> None:
    """Raise DataError if a file lacks wanted columns, with a suggestion for the first of them."""
    missing = [column for column in wanted if column not in present]
    if not missing:
        return
    guess = nearest(missing[0], present)
    hint = f" Did you mean {guess!r}?" if guess else ""
    if len(present) == 1:
        hint += " One column: if they are not separated, give what separates them with --delimiter."
    if any(part.startswith(f"{missing[0]}=") for part in file.parts):
        hint = f" There {missing[0]!r} is a name of directories: write it into the files, too."
    columns = f"column {missing[0]!r}" if len(missing) == 1 else f"columns {', '.join(map(repr, missing))}"
    raise DataError(f"{file} has no {columns}.{hint} It has: {', '.join(present)}")


def check_readable(file: Path) -> None:
    """Raise DataError if the file is missing, empty, or not the Parquet or text file that its name promises."""
    is_parquet = file.suffix == ".parquet"
    with open_bytes(file) as stream:
        head = stream.read(_SNIFFED_BYTES)
    if not head:
        raise DataError(f"{file} is empty")
    if is_parquet and not head.startswith(b"PAR1"):
        raise DataError(f"{file} is not a Parquet file, although its name ends in .parquet")
    if not is_parquet and b"\0" in head:
        line = head.count(b"\n", 0, head.index(0)) + 1
        raise DataError(
            f"{file}:{line}: a zero byte, so this is no text in UTF-8. Unpack an archive, convert UTF-16 or a workbook "
            "to CSV in UTF-8, or let the name end in .gz, .zst or .parquet"
        )
