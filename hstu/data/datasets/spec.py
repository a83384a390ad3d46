"""What a dataset declares: its features, where its raw files come from, and how SQL reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from hstu.data.datasets.raw import RawFile

if TYPE_CHECKING:  # the registry is read before any data is, so it stays free of heavy imports
    from duckdb import DuckDBPyConnection

UNKNOWN = "unknown"
"""Raw value of a feature where a user, an item or an event has none; an item without values has it as its list."""
USER_FEATURE = "user_id"
"""Name of the users' vocabulary, even where the user is not a contextual feature."""
SPLIT_NAMES = ("train", "valid", "test")
"""What a column of splits may hold, in any letter case; in the order in which a user's events have them."""
LATEST_SECOND = 10**11
"""Larger times are beyond the year 5000, so they are probably not in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The features of a store; ``context`` is in token order, ``item_features`` and ``event_features`` in any.

    ``split``: the column that says to which split an event belongs.
    ``action_cardinality``: actions lie in [0, action_cardinality); None means the largest action + 1.
    ``bins``: feature of users, items or events → number of ranges with equally many of them, into which its numbers are
    grouped.
    ``numbers``: features of items or events that are quantities. ``vectors``: item features that are vectors.
    """

    item: str
    action: str | None = None
    timestamp: str | None = "timestamp"
    context: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    event_features: tuple[str, ...] = ()
    action_cardinality: int | None = None
    bins: Mapping[str, int] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    split: str | None = None

    def of_users(self) -> dict[str, str]:
        """c0, c1, … → contextual feature, in token order, without the user."""
        return _numbered("c", (feature for feature in self.context if feature != USER_FEATURE))

    def of_items(self) -> dict[str, str]:
        """i0, i1, … → feature of the items."""
        return _numbered("i", self.item_features)

    def of_events(self) -> dict[str, str]:
        """e0, e1, … → feature of the events."""
        return _numbered("e", self.event_features)

    def quantities(self) -> dict[str, str]:
        """Those of i0, i1, …, e0, e1, … that are numbers or vectors → the feature."""
        features = self.of_items() | self.of_events()
        return {name: feature for name, feature in features.items() if feature in (*self.numbers, *self.vectors)}


def _numbered(prefix: str, features: Iterable[str]) -> dict[str, str]:
    return {f"{prefix}{place}": feature for place, feature in enumerate(features)}


@dataclass(frozen=True)
class Archive:
    """A published archive, the MD5 that its publisher states, and its SHA-256; None where it is not known."""

    url: str
    md5: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url).name

    @property
    def folder(self) -> str:
        """Top folder inside the archive."""
        return self.file.removesuffix(".zip").removesuffix(".tar.gz")


@dataclass(frozen=True)
class WheelFiles:
    """Raw files inside a wheel on PyPI: pip requirement, folder in the wheel, and the SHA-256 of each file."""

    requirement: str
    folder: str
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class ColumnDescription:
    """How errors name a column to its user: its ``label``, and in words which values are ``allowed``."""

    label: str
    allowed: str
    hint: Callable[[str], str] = lambda value: ""
    """Bad value → what its user probably meant, to be added to the message; empty if that is unknown."""


@dataclass(frozen=True)
class TypedColumns:
    """Select lists over the ingested events and tables, as RawTables describes them."""

    events: str
    tables: dict[str, str]
    """By the names of RawTables.tables."""
    labels: tuple[str, ...] = ()
    """Text of action 0, 1, …; empty where actions are numbers."""


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """The raw files of a dataset, and the SQL that turns them into events, features and titles."""

    logs: tuple[RawFile, ...]
    """Files of events, in chronological order of the files."""
    events: str
    """Select list over a log: ``user`` and ``item`` (BIGINT or VARCHAR), ``action`` (integer, if the schema has one),
    ``time`` (any type; events are sorted by it) and ``timestamp`` (BIGINT seconds), if the schema has one, ``split``
    (the place of the split in SPLIT_NAMES), if the schema has one; ``e0``, ``e1``, … (VARCHAR), the event features of
    the schema in order. An unusable value is NULL. A number is a FLOAT, which is NULL where it is missing and NaN where
    it is unusable."""
    requests: tuple[tuple[RawFile, str], ...] = ()
    """Files of impressions, and select lists over them: as ``events``, with ``request`` (the id of the request) where
    the data has one. Columns of users and items may be missing."""
    has_request_ids: bool = False
    context: tuple[RawFile, str] | None = None
    """A file with one row per user, and its select list: ``user``, then ``c0``, ``c1``, … (VARCHAR), the contextual
    features of the schema in order, without user_id."""
    event_context: tuple[str, ...] = ()
    """Those of ``c0``, ``c1``, … that are columns of ``events`` (VARCHAR): a user has the value of the first event."""
    title_table: tuple[RawFile, str] | None = None
    """A file with one row per item, and its select list: ``item``, ``title``."""
    item_table: tuple[RawFile, str] | None = None
    """A file with one row per item, and its select list: ``item``, then those of ``i0``, ``i1``, … that are its
    columns: the item features of the schema in order, VARCHAR or VARCHAR[]. A number is a FLOAT as in ``events``, and a
    vector a FLOAT[], with NaN as its first number where it is unusable."""
    event_items: tuple[str, ...] = ()
    """Those of ``i0``, ``i1``, … that are columns of ``events``: an item has the value of its first event."""
    resolve_types: Callable[[DuckDBPyConnection, str], TypedColumns] | None = None
    """For types that depend on the data: the select lists above then only pick columns (without timestamp), and
    ``resolve_types(engine, ingested events)`` returns the final ones."""
    settings: str = ""
    """Identifies everything that ``resolve_types`` depends on beside the data."""
    descriptions: Mapping[str, ColumnDescription] = field(default_factory=dict)
    """Column of ``events`` → how errors describe it."""

    @property
    def parts(self) -> tuple[tuple[RawFile, str], ...]:
        """The files of events and those of impressions, and their select lists."""
        return (*((log, self.events) for log in self.logs), *self.requests)

    @property
    def tables(self) -> dict[str, tuple[RawFile, str]]:
        """The other files that the data has, and their select lists: "context", "titles", "item_table"."""
        tables = {"context": self.context, "titles": self.title_table, "item_table": self.item_table}
        return {name: table for name, table in tables.items() if table is not None}

    @property
    def files(self) -> tuple[Path, ...]:
        """All raw files."""
        return tuple(dict.fromkeys(file.path for file, _ in (*self.parts, *self.tables.values())))


@dataclass(frozen=True)
class RawFormat:
    """One form in which the raw data is published.

    ``reader`` receives the paths of ``files`` and then ``optional_files``; optional ones may be missing.
    """

    reader: Callable[[Sequence[Path]], RawTables]
    files: tuple[str, ...]
    optional_files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One built-in dataset."""

    name: str
    homepage: str
    archive: Archive | None
    """None: the publisher gives the files to people alone, who put them where errors say."""
    raw_formats: tuple[RawFormat, ...]
    schema: Schema
    published: Mapping[str, float]
    """Published statistics of the complete data, under the names of SequenceStore.statistics."""
    wheel: WheelFiles | None = None
    action_bits: Mapping[str, int] = field(default_factory=dict)
    """Signal → its bit in the action, for actions that are bit masks."""
