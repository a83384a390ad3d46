"""What the stages of a build share: its files, its journal, its engine, and its tables as SQL."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from hstu.data.datasets import Schema
from hstu.data.preprocess.bad_rows import BadRows, Policy
from hstu.data.preprocess.engine import Connection
from hstu.data.preprocess.progress import Progress
from hstu.data.preprocess.raw import RawTables
from hstu.data.preprocess.tables import literal
from hstu.data.store_writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Where the store goes and how it is made; ``command`` is recorded as the way to make it again."""

    name: str
    output: Path
    command: str
    memory_limit: str = "4GB"
    bad_row_policy: Policy = "raise"
    max_bad_rows: int = 1000


@dataclass(frozen=True)
class Work:
    """One run over the stages. Each stage leaves a file in the writer's scratch, or a part of its arrays."""

    raw: RawTables
    schema: Schema
    options: BuildOptions
    writer: StoreWriter
    progress: Progress
    engine: Connection
    skipped: dict[str, int] = field(default_factory=dict)
    """Why -> rows, of all stages."""

    def file(self, name: str) -> Path:
        """A working file."""
        return self.writer.scratch / f"{name}.parquet"

    def bad_rows(self) -> BadRows:
        """The count of a stage, which may skip as many rows as earlier ones have left."""
        return BadRows(self.options.bad_row_policy, self.options.max_bad_rows, sum(self.skipped.values()))

    def note_skipped(self, counts: dict[str, int]) -> None:
        """Takes over the count of a finished stage."""
        for why, number in counts.items():
            self.skipped[why] = self.skipped.get(why, 0) + number

    def note_source(self, file: Path) -> None:
        """Commits the checksum of a raw file."""
        with file.open("rb") as stream:
            self.writer.journal.commit(f"source {file.name}", hashlib.file_digest(stream, "sha256").hexdigest())

    def ingested_log(self, number: int) -> str:
        """SQL of a log's rows as read, with ``row``, their number from 0."""
        return _numbered(self.file(f"log_{number}"))

    def typed_log(self, number: int) -> str:
        """SQL of a log's rows as RawTables.events describes them, with ``row``."""
        return _numbered(self.file("typed_log")) if self.raw.settle else self.ingested_log(number)

    def ingested_context(self) -> str | None:
        """SQL of the context's rows as read, with ``row``; None without context."""
        return _numbered(self.file("context")) if self.raw.context else None

    def typed_context(self) -> str | None:
        """SQL of the context's rows as RawTables.context describes them, with ``row``; None without context."""
        if self.raw.context is None:
            return None
        return _numbered(self.file("typed_context" if self.raw.settle else "context"))

    def events(self) -> str:
        """SQL of all usable events; (part, row) is their order in the raw files."""
        logs = range(len(self.raw.logs))
        parts = " UNION ALL ".join(f"SELECT {number} AS part, * FROM {self.typed_log(number)}" for number in logs)
        return f"(SELECT * FROM ({parts}) WHERE {usable(self.schema)})"


def usable(schema: Schema) -> str:
    """SQL condition of an event that has all that the schema wants."""
    return " AND ".join(f"NOT ({unusable})" for unusable in unusable_values(schema).values())


def unusable_values(schema: Schema) -> dict[str, str]:
    """Column -> SQL condition under which its value cannot be used."""
    conditions = {name: f'"{name}" IS NULL' for name in ("user", "item")}
    if schema.action:
        bound = schema.action_cardinality or 2**31 - 1
        conditions["action"] = f'("action" IS NULL OR "action" < 0 OR "action" >= {bound})'
    if schema.timestamp:
        conditions["time"] = (
            f'("time" IS NULL OR "timestamp" IS NULL OR "timestamp" < 0 OR "timestamp" >= {LATEST_SECOND})'
        )
    return conditions


LATEST_SECOND = 10**11
"""Seconds since 1970 beyond the year 5000 are milliseconds, or worse."""


def _numbered(file: Path) -> str:
    path = literal(str(file))
    rows = f"read_parquet({path}, file_row_number = true)"
    return f'(SELECT * EXCLUDE file_row_number, file_row_number AS "row" FROM {rows})'
