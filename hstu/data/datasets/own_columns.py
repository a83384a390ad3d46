"""Which columns of which files of users' own tables mean what, as users say it, and how the files are opened."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.own_types import TIME_UNITS, problems_of_lists, problems_of_numbers, text_of_lists
from hstu.data.datasets.raw import (
    COMPRESSIONS,
    RawFile,
    check_readable,
    open_text,
    probable_delimiter,
    quote_beside,
    table_with_header,
)
from hstu.data.datasets.spec import USER_FEATURE, Schema


@dataclass(frozen=True, kw_only=True)
class InteractionColumns:
    """The interactions table and its columns; the tables of users, of items and of titles, and their columns."""

    interactions: Path | Sequence[Path]
    """One file or several. Without times, their rows follow one another in this order. A directory stands for its
    files of text or Parquet, as their names say, in the order of their names."""
    user: str
    """int64 or strings."""
    item: str
    """int64 or strings."""
    action: str | None = None
    """Integers >= 0, or texts, which are numbered in alphabetical order."""
    time: str | None = None
    """Numbers since 1970, or dates. None: the rows are in time order."""
    time_unit: str = "s"
    """Of times that are numbers: s, ms, us, ns, or auto, the largest of them that gives times before the year 5000."""
    split: str | None = None
    """Which events are trained on: train, valid or test, in this order within a user. None: options of a run decide."""
    requests: tuple[Path, ...] = ()
    """Files, or directories of files, with one row per impression: an item that a request showed to a user. They have
    the columns of the interactions: user, item, action, time (of the request) and event_columns."""
    request: str | None = None
    """Column of ``requests`` with the id of the request; a user's rows of one id are one request, at the earliest of
    their times. None: a user's rows of one time are one request."""
    context: Path | None = None
    """A table with one row per user, and the same user column."""
    context_columns: tuple[str, ...] = ()
    """Contextual features in token order. The user column among them makes the user a feature, user_id. Columns that
    ``context`` lacks are taken from the interactions, where the first event of a user that has a value counts."""
    items: Path | None = None
    """A table with one row per item, and the same item column. Of several rows, an item's first counts."""
    item_columns: tuple[str, ...] = ()
    """Features of the items. Columns that ``items`` lacks are taken from the interactions, where the first event of an
    item that has a value counts."""
    event_columns: tuple[str, ...] = ()
    """Columns of the interactions that are features of the events."""
    lists: Mapping[str, str] = field(default_factory=dict)
    """Item column → what separates its values, where it has several. Lists of Parquet files need no separator."""
    numbers: tuple[str, ...] = ()
    """Item or event columns that are quantities, not categories."""
    vectors: tuple[str, ...] = ()
    """Item columns that are vectors of one width: lists of a Parquet file, or text that ``lists`` divides."""
    bins: Mapping[str, int] = field(default_factory=dict)
    """Context, item or event column → number of ranges that its numbers are grouped into."""
    titles: Path | None = None
    """A table with one row per item, and the same item column."""
    title: str | None = None
    """Column of ``titles``."""
    delimiter: str | None = None
    """What separates the columns of text files. None: a comma in .csv, a tab in .tsv."""
    header: tuple[str, ...] = ()
    """Names of the columns, for files whose first line does not name them."""
    context_delimiter: str | None = None
    """As delimiter, for ``context``. None: ``delimiter``."""
    context_header: tuple[str, ...] = ()
    """As header, for ``context``."""
    requests_delimiter: str | None = None
    """As delimiter, for ``requests``. None: ``delimiter``."""
    requests_header: tuple[str, ...] = ()
    """As header, for ``requests``."""
    titles_delimiter: str | None = None
    """As delimiter, for ``titles``. None: ``delimiter``."""
    titles_header: tuple[str, ...] = ()
    """As header, for ``titles``."""
    items_delimiter: str | None = None
    """As delimiter, for ``items``. None: ``delimiter``."""
    items_header: tuple[str, ...] = ()
    """As header, for ``items``."""

    def __post_init__(self) -> None:
        problems = []
        if self.context and not self.context_columns:
            problems.append("--context needs --context_columns, the columns to take from it")
        if (self.titles is None) != (self.title is None):
            problems.append("--titles, a table of items, and --title, its column, go together")
        if self.items and not self.item_columns:
            problems.append("--items needs --item_columns, the columns to take from it")
        problems += self._problems_of_requests()
        problems += problems_of_lists(self.lists, self.item_columns, self.bins)
        problems += problems_of_numbers(
            self.numbers, self.vectors, self.item_columns, self.event_columns, self.bins, self.lists
        )
        features = (*self.context_columns, *self.item_columns, *self.event_columns)
        for column, ranges in self.bins.items():
            if column not in features or column == self.user:
                options = "--context_columns, --item_columns or --event_columns"
                problems.append(f"--bins {column}={ranges}: {column!r} is not among {options}")
            if ranges < 2:
                problems.append(f"--bins {column}={ranges}: at least 2 ranges are needed")
        named = [self.item, self.action, self.time, self.split, *self.schema().context]
        named += [*self.item_columns, *self.event_columns]
        repeated = sorted({name for name in named if name and named.count(name) > 1})
        if repeated:
            problems.append(f"column(s) {', '.join(repeated)} would be two features; each feature needs its own column")
        if USER_FEATURE in (self.item, self.action, self.time, *self.item_columns, *self.event_columns):
            text = "is the name of the users, it cannot be the item, action or time, or a feature of items or events"
            problems.append(f"{USER_FEATURE!r} {text}")
        if self.time_unit not in (*TIME_UNITS, "auto"):
            problems.append(f"--time_unit {self.time_unit}: choose one of {', '.join(TIME_UNITS)}, auto")
        for option in ("header", "requests_header", "context_header", "titles_header", "items_header"):
            names = getattr(self, option)
            if len(set(names)) < len(names) or "" in names:
                problems.append(f"--{option} {','.join(names)}: each column needs a name of its own")
        if problems:
            raise ConfigError(problems)

    def _problems_of_requests(self) -> Iterator[str]:
        if not self.requests:
            if self.request:
                yield f"--request {self.request}: it is a column of --requests, which is missing"
            return
        if not self.time or not self.action:
            yield "--requests needs --time, which says which events come before a request, and --action, the label"
        if self.split:
            yield f"--requests and --split {self.split}: a split of events says nothing of requests; leave one out"
        if self.request in (self.user, self.item, self.action, self.time, *self.event_columns):
            yield f"--request {self.request}: the column is also given as another; name the one with the request's id"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the interactions. Raises DataError for a directory without any."""
        return all_files((self.interactions,) if isinstance(self.interactions, Path) else self.interactions)

    @property
    def request_files(self) -> tuple[Path, ...]:
        """The files of the requests. Raises DataError for a directory without any."""
        return all_files(self.requests)

    def schema(self) -> Schema:
        """Features are named after their columns; the user's is user_id."""
        context = tuple(USER_FEATURE if column == self.user else column for column in self.context_columns)
        return Schema(
            item=self.item,
            action=self.action,
            timestamp=self.time,
            context=context,
            item_features=self.item_columns,
            event_features=self.event_columns,
            bins=self.bins,
            lists=self.lists,
            numbers=self.numbers,
            vectors=self.vectors,
            split=self.split,
        )

    def arguments(self) -> dict[str, object]:
        """Option of scripts/preprocess_dataset.py → value, as it would be given there."""
        given: dict[str, object] = {}
        for name, value in (vars(self) | {"interactions": self.files, "requests": self.request_files}).items():
            if name in ("interactions", "requests"):
                given[name] = value or None
            elif isinstance(value, tuple):
                given[name] = ",".join(value) or None
            elif name == "lists":
                given[name] = text_of_lists(value) or None
            elif isinstance(value, Mapping):
                given[name] = ",".join(f"{key}={number}" for key, number in value.items()) or None
            else:
                given[name] = None if value == type(self).__dataclass_fields__[name].default else value
        return given


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
