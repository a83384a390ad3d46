"""Options that describe users' own tables, and the functions that open the files."""

from __future__ import annotations  # preprocess_dataset.py reads the text of the types

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import duckdb

from hstu.base import remote
from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets import raw
from hstu.data.datasets.lakehouse import live_files
from hstu.data.datasets.recbole import options_of
from hstu.data.datasets.spec import TIME_UNITS, USER_FEATURE, Schema

UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_TABLES = (".csv", ".tsv", *(f"{text}{end}" for text in (".csv", ".tsv") for end in raw.COMPRESSIONS), ".parquet")
"""Endings of the files that are read from a directory."""
_IN_FILES = ("interactions", "requests")
"""Options of several files. The others have one."""
SEPARATORS = {"comma": ",", "tab": "\t", "space": " "}
"""Words for list separators that are hard to type on a command line."""


def command_option(meaning: str, default: Any = None, **argument: Any) -> Any:
    """An optional field. ``argument``: further arguments of argparse."""
    given: Any = {"default_factory": dict} if default == {} else {"default": default}
    return field(**given, metadata={"help": meaning, **argument})


@dataclass(frozen=True, kw_only=True)
class InteractionColumns:
    """The tables of interactions, requests, users, items and titles: the options of scripts/preprocess_dataset.py."""

    interactions: Path | Sequence[Path] = field(
        metadata={
            "help": "text (also .gz or .zst) or Parquet files, directories of such files, or Delta or Iceberg tables, "
            "one row per event; without times, their rows follow one another in this order"
        }
    )
    user: str = field(metadata={"help": "column of the user, int64 or strings"})
    item: str = field(metadata={"help": "column of the item, int64 or strings"})
    sequences: bool = command_option("lines are 'user item item …' of a user, or 'user item' of an event", False)
    action: str | None = command_option("column of the action, integers >= 0 or texts, numbered in alphabetical order")
    time: str | None = command_option(
        "column of the time, a number since 1970 or a date; without it: order of the rows"
    )
    time_unit: str = command_option("unit of times that are numbers", "s", choices=TIME_UNITS)
    split: str | None = command_option(
        "column that says which events are train, valid and test, in this order within a user"
    )
    requests: tuple[Path, ...] = command_option(
        "files, as of --interactions, with one row per impression, in columns of the same names: what to rank. The "
        "time is that of the request",
        (),
    )
    request: str | None = command_option(
        "column of --requests with the id of the request; without it a user's rows of a time"
    )
    context: Path | None = command_option("table with one row per user, with the same user column")
    context_columns: tuple[str, ...] = command_option(
        "columns of --context or of the interactions, as a,b,c, in token order; also the user column. In the "
        "interactions the first event of a user that has a value counts",
        (),
    )
    items: Path | None = command_option(
        "table with one row per item, with the same item column (the first counts), or .json"
    )
    item_columns: tuple[str, ...] = command_option(
        "columns of --items or the interactions, as a,b,c; one name for .json", ()
    )
    event_columns: tuple[str, ...] = command_option(
        "columns of the interactions that are features of events, as a,b,c", ()
    )
    lists: Mapping[str, str] = command_option(
        "item columns with several values → what separates them, as 'genres=|,tags=comma'; lists of Parquet files need "
        "none",
        {},
    )
    numbers: tuple[str, ...] = command_option("item or event columns that are quantities, as price,watch_time", ())
    vectors: tuple[str, ...] = command_option(
        "item columns that are vectors of one width: lists of Parquet files, or text with --lists", ()
    )
    bins: Mapping[str, int] = command_option(
        "columns of numbers, of users, items or events → ranges to group them into, as age=10", {}
    )
    titles: Path | None = command_option("table with one row per item, with the same item column")
    title: str | None = command_option("column of --titles")
    delimiter: str | None = command_option(
        "what separates columns in all text files, as ';', '::' or tab; without it, the first line of each decides"
    )
    header: tuple[str, ...] = command_option(
        "names of the columns of --interactions, as a,b,c, if the first line does not name them", ()
    )

    def __post_init__(self) -> None:
        ConfigError.raise_if([*self._contradictions(), *self._problems_of_features()])

    def _contradictions(self) -> Iterator[str]:
        others = (self.user, self.item, self.action, self.time, *self.event_columns)
        rules = (
            (self.context and not self.context_columns,
             "--context needs --context_columns, the columns to take from it"),
            ((self.titles is None) != (self.title is None),
             "--titles, a table of items, and --title, its column, go together"),
            (self.items and not self.item_columns, "--items needs --item_columns, the columns to take from it"),
            (self.request and not self.requests,
             f"--request {self.request}: it is a column of --requests, which is missing"),
            (self.requests and not (self.time and self.action),
             "--requests needs --time, which says which events come before a request, and --action, the label"),
            (self.requests and self.split,
             f"--requests and --split {self.split}: a split of events says nothing of requests; leave one out"),
            (self.requests and self.request in others,
             f"--request {self.request}: the column is also given as another; name the one with the request's id"),
            (self.time_unit not in TIME_UNITS,
             f"--time_unit {self.time_unit}: choose one of {', '.join(TIME_UNITS)}"),
            (len(set(self.header)) < len(self.header) or "" in self.header,
             f"--header {','.join(self.header)}: each column needs a name of its own"),
            (self.sequences and self.header, "--header does not go with --sequences, whose lines have no columns"),
        )  # fmt: skip
        return (message for is_wrong, message in rules if is_wrong)

    def _problems_of_features(self) -> Iterator[str]:
        named = [self.item, self.action, self.time, self.split, *self.schema().context]
        named += [*self.item_columns, *self.event_columns]
        if repeated := sorted({name for name in named if name and named.count(name) > 1}):
            yield f"column(s) {', '.join(repeated)} would be two features; each feature needs its own column"
        if USER_FEATURE in (self.item, self.action, self.time, *self.item_columns, *self.event_columns):
            yield (
                f"{USER_FEATURE!r} is the name of the users, it cannot be the item, action or time, or a feature of "
                "items or events"
            )
        of_items, of_events = set(self.item_columns), set(self.event_columns)
        kinds = (
            ("lists", self.lists, of_items, "--item_columns; only items have lists", ("bins",)),
            ("numbers", self.numbers, of_items | of_events, "--item_columns or --event_columns",
             ("bins", "lists", "vectors")),
            ("vectors", self.vectors, of_items, "--item_columns; only items have vectors", ("bins",)),
            ("bins", self.bins, of_items | of_events | set(self.context_columns) - {self.user},
             "--context_columns, --item_columns or --event_columns", ()),
        )  # fmt: skip
        for kind, columns, possible, options, excluded in kinds:
            for column in columns:
                if column not in possible:
                    yield f"--{kind} {column}: {column!r} is not among {options}"
                if others := [f"--{other}" for other in excluded if column in getattr(self, other)]:
                    yield f"--{kind} {column}: {column!r} is among {' and '.join(others)}, too; leave one out"
        for column, separator in self.lists.items():
            if not separator:
                yield f"--lists {column}=: say what separates the values, as {column}=|"
        for column, ranges in self.bins.items():
            if ranges < 2:
                yield f"--bins {column}={ranges}: at least 2 ranges are needed"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The tables of these options. Sequences and RecBole's files need no ``user`` and ``item``."""
        given = {name: value for name, value in options.items() if value or name == "interactions"}
        if given.get("sequences"):
            given = {"user": "user", "item": "item", **given}
        elif ".inter" in (first := Path(given["interactions"][0])).suffixes and not given.keys() >= {"user", "item"}:
            given = options_of(remote.stage(first, raw=True), given)
        if not given.keys() >= {"user", "item"}:
            raise ConfigError("--interactions needs --user and --item, the columns of the users and of the items")
        return cls(**given)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the interactions. Raises DataError for a directory without any."""
        return _all_files((self.interactions,) if isinstance(self.interactions, Path) else self.interactions)

    @property
    def request_files(self) -> tuple[Path, ...]:
        """The files of the requests. Raises DataError for a directory without any."""
        return _all_files(self.requests)

    @property
    def tables(self) -> tuple[Path, ...]:
        """The files of the other tables, which are read as a whole."""
        return (*self.request_files, *filter(None, (self.context, self.titles, self.items)))

    def schema(self) -> Schema:
        """The schema. Features are named after their columns; the user feature is user_id."""
        return Schema(
            item=self.item,
            action=self.action,
            timestamp=self.time,
            context=tuple(USER_FEATURE if column == self.user else column for column in self.context_columns),
            item_features=self.item_columns,
            event_features=self.event_columns,
            bins=self.bins,
            numbers=self.numbers,
            vectors=self.vectors,
            split=self.split,
        )

    def arguments(self) -> dict[str, object]:
        """Option of scripts/preprocess_dataset.py → value on its command line; None for defaults."""
        given: dict[str, object] = {"interactions": self.files, "requests": self.request_files or None}
        words = {separator: word for word, separator in SEPARATORS.items()}
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, Mapping):
                value = tuple(f"{column}={words.get(text, text)}" for column, text in value.items())
            given.setdefault(option.name, as_argument(value, option.default))
        return given


def as_argument(value: object, default: object) -> object:
    """What an option has on a command line: () of a flag, None of its default."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or None
    return None if value == default else () if value is True else value


def staged(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of tables, with local copies of the files and directories that are URLs, and the files of Delta and
    Iceberg tables as they are now. Raises DataError and ConfigError."""

    def local(name: str, path: str | Path) -> tuple[Path, ...]:
        if (files := live_files(path)) is None:
            return (remote.stage(path, raw=True),)
        if name == "interactions" and not options.get("time"):
            raise ConfigError(f"{path}: a table of Delta or Iceberg has no order of rows; give --time")
        if name not in _IN_FILES and len(files) > 1:
            raise DataError(f"{path}: --{name} is one file, and this table has {len(files)}; compact it into one")
        return files

    found = dict(options)
    for name in (*_IN_FILES, "context", "items", "titles"):
        if value := options.get(name):
            paths = [value] if isinstance(value, str | Path) else value
            files = tuple(file for path in paths for file in local(name, path))
            found[name] = files if name in _IN_FILES else files[0]
    return found


def _all_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(file for path in paths for file in (_files_in(path) if path.is_dir() else [path]))


def _files_in(directory: Path) -> list[Path]:
    """Files of a directory with an ending of _TABLES, sorted by name with numbers in numeric order."""

    def key(file: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", file.name)]

    files = [file for file in directory.iterdir() if file.name.endswith(_TABLES) and not file.name.startswith(".")]
    if not files:
        raise DataError(f"{directory} is a directory without files that end in {', '.join(_TABLES)}; name the files")
    return sorted(files, key=key)


def open_table(file: Path, delimiter: str | None, header: Sequence[str] = (), sequences: bool = False) -> raw.RawFile:
    """Open a table and read its header. ``header``: column names for a file without them, as sequences."""
    raw.check_readable(file)
    if sequences:
        columns = dict.fromkeys(header, "VARCHAR")
        return raw.SequenceFile(path=file, columns=columns, header=False, delimiter=delimiter or " ")
    if file.suffix == ".parquet":
        if header:
            raise ConfigError(f"{file}: a Parquet file has names of its columns; leave out --header")
        return raw.RawFile(path=file)
    delimiter = delimiter or raw.probable_delimiter(file)
    typed = raw.typed_header(file, delimiter) if not header else dict.fromkeys(header, "")
    quote = "" if all(typed.values()) else raw.quote_beside(delimiter)  # RecBole writes quotes as any other character
    columns = dict.fromkeys(typed, "VARCHAR")
    return raw.RawFile(path=file, columns=columns, delimiter=delimiter, header=not header, quote=quote)


def columns_of(table: raw.RawFile) -> dict[str, str]:
    """Column → SQL type."""
    if table.columns is not None:
        return dict(table.columns)
    try:
        with duckdb.connect() as engine:
            described = engine.execute(f"DESCRIBE SELECT * FROM {table.relation()}").fetchall()
    except duckdb.Error as error:
        raise DataError(f"{table.path} is a damaged Parquet file: {str(error).splitlines()[0]}") from error
    return {row[0]: row[1] for row in described}
