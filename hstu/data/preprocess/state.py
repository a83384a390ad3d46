"""What the stages of a build share: options, files and journal, the count of bad rows, progress, and tables as SQL."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, TypedDict

from tqdm import tqdm

from hstu.base.errors import DataError
from hstu.data.datasets.raw import parquet_rows
from hstu.data.datasets.spec import LATEST_SECOND, RawTables, Schema
from hstu.data.preprocess.engine import Connection
from hstu.data.store.meta import sha256
from hstu.data.store.writer import StoreWriter

_log = logging.getLogger(__name__)

Policy = Literal["raise", "skip"]
READING, NUMBERING, WRITING = 1.0, 0.3, 1.0
"""Effort of the stages, relative to reading the logs; measured."""
_POLL_S = 0.5
_LINE_EVERY_S = 30.0


class BuildLimits(TypedDict, total=False):
    """Limits of a build that a user may set."""

    memory_limit: str
    """Of the whole process, such as "4GB". Larger data is kept in working files beside the store."""
    bad_row_policy: Policy
    """"raise": the first row that cannot be used ends the run; "skip": such rows are skipped and counted."""
    max_bad_rows: int
    """With "skip": more such rows than this end the run."""
    raw_ids: tuple[str, ...]
    """"item", "user": models get their raw ids, int64, in place of codes; their tables are dynamic."""
    min_user_events: int
    """Users with fewer events are left out; with ``min_item_events`` until all that is left has enough."""
    min_item_events: int
    """Items with fewer events are left out."""
    all_items: bool
    """The items of the tables of items and titles that have no events are items, too."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Where the store goes and how it is made; ``command`` is stored as the way to make it again.

    ``force`` replaces an existing store.
    """

    name: str
    output: Path
    command: str
    force: bool = False
    memory_limit: str = "4GB"
    bad_row_policy: Policy = "raise"
    max_bad_rows: int = 1000
    raw_ids: tuple[str, ...] = ()
    min_user_events: int = 1
    min_item_events: int = 1
    all_items: bool = False


@dataclass
class BadRows:
    """Counts rows that cannot be used. The first one ends the run, or they are skipped up to ``limit``."""

    policy: Policy
    limit: int
    before: int = 0
    """Rows that earlier stages have skipped."""
    counts: Counter[str] = field(default_factory=Counter)
    """Reason → rows."""

    def add(self, number: int, reason: str, location: str, detail: str) -> None:
        """Counts ``number`` rows, the first of them at ``location``. DataError unless they may be skipped."""
        if not number:
            return
        more = f" ({number:,} such rows)" if number > 1 else ""
        if self.policy == "raise":
            raise DataError(
                f"{location}: {detail}{more}. Correct or remove it, or skip such rows with --bad_row_policy skip"
            )
        self.counts[reason] += number
        total = self.before + self.counts.total()
        if total > self.limit:
            raise DataError(
                f"{location}: {detail}{more}. That makes {total:,} bad rows, more than --max_bad_rows {self.limit:,}"
            )
        _log.warning("skipped: %s: %s%s", location, detail, more)


class _LogLines:
    """A file for tqdm that logs what is written to it."""

    def write(self, text: str) -> None:
        if text.strip():
            _log.info("%s", text.strip())

    def flush(self) -> None:
        pass


class Progress:
    """Progress over all stages: a bar on a terminal, a log line every half minute elsewhere."""

    def __init__(self, unit: float) -> None:
        """``unit``: the effort of reading the logs; efforts are in any unit."""
        self.unit = unit
        self._on_terminal = sys.stderr.isatty()
        bar = "|{bar}| {elapsed} elapsed" if self._on_terminal else " done"
        self._bar: tqdm[NoReturn] = tqdm(
            total=unit * (READING + NUMBERING + WRITING),
            bar_format=f"{{desc}}: {{percentage:3.0f}}%{bar}, {{remaining}} left",
            file=None if self._on_terminal else _LogLines(),
            delay=0 if self._on_terminal else _LINE_EVERY_S,
            mininterval=0.1 if self._on_terminal else _LINE_EVERY_S,
            miniters=0,
            smoothing=0,
        )

    def skip(self, effort: float) -> None:
        """Counts work of an earlier run, which does not enter the estimate of the time left."""
        self._bar.initial += effort
        self._bar.update(effort)

    @contextmanager
    def stage(self, what: str, effort: float, engine: Connection | None = None) -> Iterator[None]:
        """``effort`` is done when the block ends; meanwhile ``engine`` reports the progress of its query."""
        self._bar.set_description_str(what, refresh=self._on_terminal)
        end, finished = self._bar.n + effort, threading.Event()

        def poll(engine: Connection) -> None:
            while not finished.wait(_POLL_S):
                left = 1 - min(max(engine.query_progress(), 0.0), 100.0) / 100
                self._bar.update(max(end - left * effort - self._bar.n, 0.0))

        poller = threading.Thread(target=poll, args=(engine,), daemon=True)
        if engine is not None:
            poller.start()
        try:
            yield
        finally:
            finished.set()
            if engine is not None:
                poller.join()
        self._bar.update(end - self._bar.n)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


@dataclass(frozen=True)
class BuildState:
    """One run over the stages. Each stage leaves a file in the writer's scratch folder, or a part of its arrays."""

    raw: RawTables
    schema: Schema
    options: BuildOptions
    writer: StoreWriter
    progress: Progress
    engine: Connection
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason → skipped rows, over all stages."""

    def file(self, name: str) -> Path:
        """A working file."""
        return self.writer.scratch / f"{name}.parquet"

    def bad_rows(self) -> BadRows:
        """The counter of a stage, which may skip as many rows as earlier stages have left."""
        return BadRows(self.options.bad_row_policy, self.options.max_bad_rows, self.skipped.total())

    def commit_source(self, file: Path) -> None:
        """Commits the checksum of a raw file."""
        (name,) = (name for name, other in source_names(self.raw.files).items() if other == file)
        self.writer.journal.commit(f"source {name}", sha256(file))

    def ingested_log(self, number: int) -> str:
        """SQL of a log's rows as read, with ``row``, their number from 0."""
        return _numbered(self.file(f"log_{number}"))

    def ingested_logs(self) -> str:
        """SQL of the rows of all logs as read, impressions included; ``part`` is the number in RawTables.parts."""
        return _parts({number: self.ingested_log(number) for number in range(len(self.raw.parts))})

    def typed_log(self, number: int) -> str:
        """SQL of a log's rows as RawTables.events describes them, with ``row``."""
        return _numbered(self.file(f"typed_log_{number}")) if self.raw.resolve_types else self.ingested_log(number)

    def typed_context(self) -> str | None:
        """SQL of the context's rows as RawTables.context describes them, with ``row``; None without such a file."""
        if self.raw.context is None:
            return None
        return _numbered(self.file("typed_context" if self.raw.resolve_types else "context"))

    def typed_titles(self) -> str | None:
        """SQL of the titles' rows as RawTables.title_table describes them, with ``row``; None without such a file."""
        return _numbered(self.file("typed_titles")) if self.raw.title_table else None

    def typed_items(self) -> str | None:
        """SQL of the items' rows as RawTables.item_table describes them, with ``row``; None without such a table."""
        if self.raw.item_table is None and self.raw.item_rows is None:
            return None
        numbers = [name for name in self.numbers() if name in self.item_features() and name not in self.raw.event_items]
        if not numbers:
            return self.all_typed_items()
        usable = " AND ".join(f"NOT ({self.unusable_number(name)})" for name in numbers)
        return f"(SELECT * FROM {self.all_typed_items()} WHERE {usable})"

    def all_typed_items(self) -> str:
        """The same, with the rows whose numbers cannot be used."""
        is_typed = self.raw.resolve_types or self.raw.item_rows
        return _numbered(self.file("typed_item_table" if is_typed else "item_table"))

    def item_features(self) -> dict[str, str]:
        """i0, i1, … → the feature of the items."""
        return {f"i{place}": feature for place, feature in enumerate(self.schema.item_features)}

    def event_features(self) -> dict[str, str]:
        """e0, e1, … → the feature of the events."""
        return {f"e{place}": feature for place, feature in enumerate(self.schema.event_features)}

    def numbers(self) -> dict[str, str]:
        """Those of i0, i1, …, e0, e1, … that are numbers or vectors → the feature."""
        features = self.item_features() | self.event_features()
        named = (*self.schema.numbers, *self.schema.vectors)
        return {name: feature for name, feature in features.items() if feature in named}

    def width(self, name: str) -> int:
        """Numbers of a vector, those of the first row that has one; 1 for what is no vector."""
        if self.numbers()[name] not in self.schema.vectors:
            return 1
        stage, journal = f"width {name}", self.writer.journal
        if stage not in journal:
            rows, order = (self.all_typed_items(), '"row"')
            if name in self.raw.event_items:
                rows, order = self.typed_logs(), 'part, "row"'
            query = f"SELECT len({name}) FROM {rows} WHERE NOT isnan({name}[1]) ORDER BY {order} LIMIT 1"
            found = self.engine.execute(query).fetchall()
            journal.commit(stage, int(found[0][0]) if found else 1)
        return int(journal[stage])

    def unusable_number(self, name: str) -> str:
        """SQL condition under which a number or a vector cannot be used."""
        if self.numbers()[name] not in self.schema.vectors:
            return f"coalesce(isnan({name}), false)"
        return f"({name} IS NOT NULL AND (isnan({name}[1]) OR len({name}) <> {self.width(name)}))"

    def codes(self, table: str) -> str:
        """SQL of "users", "items" or a vocabulary: id, its ``code``, and for users and items their ``events``."""
        rows = parquet_rows(self.file(table), numbered=True)
        return f"(SELECT * EXCLUDE file_row_number, file_row_number AS code FROM {rows})"

    def numbered(self, name: str) -> str:
        """SQL of the rows of a working file, with ``row``, their number from 0."""
        return _numbered(self.file(name))

    def all_items(self) -> str | None:
        """SQL of the items that belong to the store with or without events; None where events alone decide."""
        if not self.options.all_items:
            return None
        tables = [table for table in (self.typed_titles(), self.typed_items()) if table]
        if tables and self.raw.titles is None:
            every = " UNION ALL ".join(f"SELECT item FROM {table} WHERE item IS NOT NULL" for table in tables)
            return f"({every})"
        ids = ", ".join(map(str, self.raw.titles or {}))
        return f"(SELECT unnest(CAST([{ids}] AS BIGINT[])) AS item)"

    def labels(self) -> list[str]:
        """Text of action 0, 1, …; empty where actions are numbers."""
        return self.writer.journal["typed"]["labels"] if self.raw.resolve_types else []

    def events(self) -> str:
        """SQL of all events of the store; (part, row) is their order in the raw files."""
        if "core" not in self.writer.journal:
            return self.usable_events()
        kept = " AND ".join(
            f'"{name}" IN (SELECT id FROM {parquet_rows(self.core_file(name))})' for name in ("user", "item")
        )
        return f"(SELECT * FROM {self.usable_events()} WHERE {kept})"

    def core_file(self, name: str) -> Path:
        """The ids of "user" or "item" that the k-core filters keep."""
        return self.file(f"core_{name}s")

    def usable_events(self) -> str:
        """SQL of all events that can be used, before any are filtered out."""
        return self._usable(range(len(self.raw.logs)))

    def typed_logs(self) -> str:
        """SQL of the rows of all logs as RawTables.events describes them; ``part`` is the number of the log."""
        return _parts({number: self.typed_log(number) for number in range(len(self.raw.logs))})

    def impressions(self) -> str:
        """SQL of all impressions that can be used."""
        return self._usable(range(len(self.raw.logs), len(self.raw.parts)))

    def candidates(self) -> str:
        """SQL of the impressions of the requests that the store has, with ``number``, their request's row."""
        return parquet_rows(self.file("candidates"))

    def shown_items(self) -> str:
        """SQL of the events and of the candidates, which lack columns of users."""
        if not self.raw.requests:
            return self.events()
        return f"(SELECT * FROM {self.events()} UNION ALL BY NAME SELECT * EXCLUDE number FROM {self.candidates()})"

    def _usable(self, parts: Sequence[int]) -> str:
        rows = _parts({number: self.typed_log(number) for number in parts})
        if self.writer.journal.stages.get("checked") == {}:  # every row is usable
            return rows
        usable = " AND ".join(f"NOT ({unusable})" for unusable in self.unusable_values(parts[0]).values())
        return f"(SELECT * FROM {rows} WHERE {usable})"

    def unusable_values(self, part: int) -> dict[str, str]:
        """Column → SQL condition under which its value in a part cannot be used."""
        conditions = {name: f'"{name}" IS NULL' for name in ("user", "item")}
        if self.schema.action:
            bound = self.schema.action_cardinality or 2**31 - 1
            conditions["action"] = f'("action" IS NULL OR "action" < 0 OR "action" >= {bound})'
        if self.schema.timestamp:
            conditions["time"] = (
                f'("time" IS NULL OR "timestamp" IS NULL OR "timestamp" < 0 OR "timestamp" >= {LATEST_SECOND})'
            )
        if self.schema.split:
            conditions["split"] = '"split" IS NULL'
        if self.raw.has_request_ids and part >= len(self.raw.logs):
            conditions["request"] = "coalesce(request, '') = ''"
        for name in self.numbers():
            if name in self.event_features() or name in self.raw.event_items:
                conditions[name] = self.unusable_number(name)
        return conditions

    def order(self) -> str:
        """SQL columns by which the events of a user are sorted. A split separates events of one time."""
        time = '"time", ' if self.schema.timestamp else ""
        split = '"split", ' if self.schema.timestamp and self.schema.split else ""
        return f'{time}{split}part, "row"'


def _parts(logs: Mapping[int, str]) -> str:
    """SQL of the rows of several logs. A log may lack columns of the others, which are then NULL."""
    rows = (f"SELECT {number} AS part, * FROM {log}" for number, log in logs.items())
    return "(" + " UNION ALL BY NAME ".join(rows) + ")"


def source_names(files: Sequence[Path]) -> dict[str, Path]:
    """Raw files by how meta.json lists them: by name, or by path where two files have the name."""
    namesakes = Counter(file.name for file in dict.fromkeys(files))
    return {file.name if namesakes[file.name] == 1 else str(file): file for file in files}


def _numbered(file: Path) -> str:
    rows = parquet_rows(file, numbered=True)
    return f'(SELECT * EXCLUDE file_row_number, file_row_number AS "row" FROM {rows})'
