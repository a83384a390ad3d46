"""What a reader of raw files hands to the build: where the rows are and, as SQL, what each column means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hstu.data.preprocess.engine import Connection
from hstu.data.preprocess.tables import RawFile

EVENT_COLUMNS = ("user", "item", "action", "time")


@dataclass(frozen=True)
class Meaning:
    """A column as its user knows it: ``label`` and, in words, what is ``allowed`` in it."""

    label: str
    allowed: str


@dataclass(frozen=True)
class Typed:
    """SQL from the ingested tables: select lists as RawTables.events and RawTables.context describe them."""

    events: str
    context: str | None


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """A raw dataset as SQL.

    logs: the files of events, in their order. events: select list from one of them, giving user and item (both BIGINT
      or VARCHAR), action (if the schema has one; integer), and time (any type, what events are ordered by) with
      timestamp (BIGINT, seconds), if the schema has one. NULL is a value that cannot be used.
    context: a file with one row a user, and its select list: user, then each contextual feature but user_id as VARCHAR,
      named c0, c1, … in the order of the schema.
    settle: where the types depend on the data, the select lists only pick the columns (same names, without timestamp),
      and this gives the final ones: (engine, relation of the ingested events, that of the context) -> Typed.
    """

    logs: tuple[RawFile, ...]
    events: str
    context: tuple[RawFile, str] | None = None
    settle: Callable[[Connection, str, str | None], Typed] | None = None
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    titles: Mapping[int, str] | None = None
    title_file: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All raw files."""
        context = (self.context[0].path,) if self.context else ()
        return (*(log.path for log in self.logs), *context, *((self.title_file,) if self.title_file else ()))
