"""First stages: read raw files into working tables, check their values, and drop rare users and items."""

from __future__ import annotations

import io
import logging
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import duckdb

from hstu.base.errors import DataError
from hstu.base.times import as_date
from hstu.data.datasets.raw import COMPRESSIONS, RawFile, identifier, open_bytes
from hstu.data.datasets.spec import FIRST_LIKELY, LAST_LIKELY, LATEST_SECOND, ColumnDescription
from hstu.data.preprocess.state import Build, Engine, one, source_digest, source_names

_log = logging.getLogger(__name__)

_UNQUOTED, _TOO_LONG = "UNQUOTED VALUE", "LINE SIZE OVER MAXIMUM"
_MIXED_LINE_ENDS = "CSV Parser state machine reached an invalid state"
"""DuckDB's error for a file that mixes CR LF and LF line ends."""
_MANY_EVENTS = 1000
"""So many events are neither a toy nor a first try, so their times are checked."""
_SHOWN = 80
"""Most characters of a value in a message."""
_Rejected = tuple[int, str, str, str]
"""Number of unreadable lines, and of the first of them: reason, location, detail."""
_REASONS = {
    "CAST": "value of the wrong type",
    "MISSING COLUMNS": "too few columns",
    "TOO MANY COLUMNS": "too many columns",
    "INVALID ENCODING": "not UTF-8",
}


def read_files(build: Build) -> None:
    """Create the tables log_0, … and typed, and context, titles and item_table if the data has them."""
    raw = build.raw
    files = {f"log_{number}": part for number, part in enumerate(raw.parts)}
    files |= {f"{name}_as_read": table for name, table in raw.tables.items()}
    unread = {name: file for name, file in files.items() if name not in build.writer.journal}
    found = build.engine.each(_ingest, [(*file, build.file(name)) for name, file in unread.items()])
    for name, (file, _) in files.items():
        build.skipped.update(build.once(name, lambda: _count(build, file, *next(found))))  # noqa: B023
        build.engine.show(name, build.file(name), "source_row")
    parts = (f"SELECT {number} AS part, * FROM log_{number}" for number in range(len(raw.parts)))
    build.engine.view("as_read", " UNION ALL BY NAME ".join(parts))  # columns that a file lacks are NULL
    if (resolve := raw.resolve_types) is None:
        build.engine.view("typed", "SELECT * FROM as_read")
        for name in raw.tables:
            build.engine.view(name, f"SELECT * FROM {name}_as_read")
        return
    types = build.once("types", lambda: resolve(build.engine.sql, "as_read"))
    build.table("typed", f"SELECT part, source_row, {types['events']} FROM as_read")
    for name in raw.tables:
        build.table(name, f"SELECT source_row, {types[name]} FROM {name}_as_read")


def _count(build: Build, file: RawFile, digest: str, rejected: _Rejected | None) -> Counter[str]:
    """Count the unreadable lines of a file by reason. Raises DataError if they may not be skipped."""
    bad: Counter[str] = Counter()
    if rejected:
        build.skip(bad, *rejected)
    (source,) = (source for source, other in source_names(build.raw.files).items() if other == file.path)
    build.writer.journal.commit(f"source {source}", digest)
    return bad


def _ingest(engine: Engine, raw: RawFile, select: str, target: Path) -> tuple[str, _Rejected | None]:
    """Write ``select`` of the readable rows. Returns the file's digest, and what build.skip needs of unreadable lines.
    Raises DataError if no line may be skipped."""
    read, uniform = raw, replace(raw, path=target.with_suffix(".lines"))
    try:
        try:
            engine.write(f"SELECT {select} FROM {raw.relation()}", target)
        except duckdb.InvalidInputException as error:
            if _MIXED_LINE_ENDS not in str(error):
                raise
            read = uniform
            _copy_with_uniform_lines(raw.path, uniform.path)
            engine.write(f"SELECT {select} FROM {uniform.relation()}", target)
        return source_digest(raw.path), None if raw.columns is None else _rejected(engine, raw, read)
    except (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException) as error:
        text = str(error)
        if raw.path.name not in text and not any(kind.upper() in text.upper() for kind in COMPRESSIONS.values()):
            raise
        byte = re.search(r"at byte (\d+)", text)  # of JSON
        place = f"{raw.path}:{raw.line_at(int(byte[1]) - 1)}" if byte else raw.path
        raise DataError(f"cannot read {place}: {text.splitlines()[0].partition(': ')[2]}") from error
    finally:
        uniform.path.unlink(missing_ok=True)


def _copy_with_uniform_lines(file: Path, target: Path) -> None:
    """Copy a text file uncompressed, with LF line ends. Latin-1 keeps all other bytes."""
    with open_bytes(file) as source, target.open("w", encoding="latin-1", newline="\n") as copy:
        shutil.copyfileobj(io.TextIOWrapper(source, encoding="latin-1"), copy)


def _rejected(engine: Engine, raw: RawFile, read: RawFile) -> _Rejected | None:
    """The lines that DuckDB rejected. ``read``: ``raw``, or its copy with LF line ends."""
    first = ", ".join(f"arg_min({name}, line_byte_position)" for name in ("error_type", "error_message", "column_name"))
    hidden = f"max(error_type::VARCHAR IN ('{_UNQUOTED}', '{_TOO_LONG}'))"
    try:
        query = f"SELECT count(DISTINCT line), min(line_byte_position), {first}, {hidden} FROM reject_errors"
        ((number, byte, kind, message, name, hides_lines),) = engine.connection.execute(query).fetchall()
    except duckdb.CatalogException:  # the table exists only after a rejected line
        return None
    engine.connection.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    if not number:
        return None
    location = f"{raw.path}:{read.line_at(byte - 1)}"  # DuckDB counts from 1
    detail = _explain(kind, message, name)
    if hides_lines:  # an unclosed quote also makes an unknown number of further lines unreadable
        raise DataError(
            f"{location}: {detail}. The lines after it cannot be read either, so it cannot be skipped: correct it"
        )
    return number, _REASONS.get(kind, "unreadable line"), location, detail


def _explain(kind: str, message: str, name: str | None) -> str:
    """Rephrase DuckDB's message for users, in one line."""
    if kind == "CAST":
        value = message.partition('Could not convert string "')[2].rpartition('" to ')[0]
        wanted = "an integer" if "INT" in message.rpartition(" to ")[2] else "a number"
        return f"column {name!r} holds {value!r}, which is not {wanted} of 64 bits"
    if kind == "INVALID ENCODING":
        return "bytes that are not UTF-8; convert the file, e.g. with iconv -f LATIN1 -t UTF-8"
    if kind == _UNQUOTED:
        return "a quote is opened and not closed, or text follows a closed one"
    if kind == _TOO_LONG:
        return "a line of more than 2,000,000 bytes"
    text = message.splitlines()[0].replace("Expected Number of Columns:", "expected columns:").replace("Found", "found")
    return text + " or more; each row is one event, item or user (or see --sequences)" * (kind == "TOO MANY COLUMNS")


def check_rows(build: Build) -> None:
    """Create views without bad rows. Raises DataError for bad rows that may not be skipped, and if no event remains."""
    build.skipped.update(build.once("checked", lambda: _check(build)))
    first = len(build.raw.logs)  # part of requests
    for name, part, of_parts in (("usable_events", 0, f"part < {first}"), ("impressions", first, f"part >= {first}")):
        usable = _usable(build, part) if build.writer.journal["checked"] else "true"
        build.engine.view(name, f"SELECT * FROM typed WHERE {of_parts} AND {usable}")
    if "item_table" in build.raw.tables:
        conditions = [f"NOT {unusable_number(build, name)}" for name in _quantities_of_items(build)]
        build.engine.view("usable_items", f"SELECT * FROM item_table WHERE {' AND '.join(conditions) or 'true'}")


def _usable(build: Build, part: int) -> str:
    return " AND ".join(f"NOT ({unusable})" for unusable in _unusable_values(build, part).values())


def _check(build: Build) -> Counter[str]:
    bad: Counter[str] = Counter()
    for part, (log, _) in enumerate(build.raw.parts):
        _check_table(build, f"typed WHERE part = {part}", _unusable_values(build, part), f"log_{part}", log, bad)
    of_items = _quantities_of_items(build)
    if of_items:
        conditions = {name: unusable_number(build, name) for name in of_items}
        _check_table(build, "item_table", conditions, "item_table_as_read", build.raw.tables["item_table"][0], bad)
    for name, feature in build.schema.quantities().items():
        rows = "item_table" if name in of_items else f"typed WHERE part < {len(build.raw.logs)}"
        if not build.keeps(name) and one(build.engine, f"SELECT count({name}) FROM {rows}") == (0,):
            raise DataError(f"{feature!r} is empty in every row; leave it out")
    usable = f"part < {len(build.raw.logs)} AND {_usable(build, 0)}"
    if one(build.engine, f"SELECT count(*) FROM typed WHERE {usable}") == (0,):
        raise DataError(f"{', '.join(str(log.path) for log in build.raw.logs)}: no events")
    return bad


def _unusable_values(build: Build, part: int) -> dict[str, str]:
    schema, raw = build.schema, build.raw
    conditions = {name: f'"{name}" IS NULL' for name in ("user", "item")}
    if schema.action:
        bound = schema.action_cardinality or 2**31 - 1
        conditions["action"] = f"(action IS NULL OR action < 0 OR action >= {bound})"
    if schema.timestamp:
        conditions["time"] = (
            f'("time" IS NULL OR "timestamp" IS NULL OR "timestamp" < 0 OR "timestamp" >= {LATEST_SECOND})'
        )
    if schema.split:
        conditions["split"] = '"split" IS NULL'
    if raw.has_request_ids and part >= len(raw.logs):
        conditions["request"] = "coalesce(request, '') = ''"
    of_events = (name for name in schema.quantities() if name in schema.of_events() or name in raw.event_items)
    return conditions | {name: unusable_number(build, name) for name in of_events}


def unusable_number(build: Build, name: str) -> str:
    """SQL condition for an unusable number or vector."""
    if build.schema.quantities()[name] not in build.schema.vectors:
        return f"coalesce(isnan({name}), false)"
    return f"({name} IS NOT NULL AND (isnan({name}[1]) OR len({name}) <> {vector_width(build, name)}))"


def vector_width(build: Build, name: str) -> int:
    """Width of a vector feature, which its first vector decides; 1 for other features."""
    if build.schema.quantities()[name] not in build.schema.vectors:
        return 1
    if build.base and build.keeps(name):
        return build.base.store.features[build.schema.quantities()[name]].width
    of_events = name in build.raw.event_items
    rows, order = ("typed", "part, source_row") if of_events else ("item_table", "source_row")
    query = f"SELECT len({name}), {order} FROM {rows} WHERE NOT isnan({name}[1]) ORDER BY {order} LIMIT 1"
    return build.once(f"width {name}", lambda: next((row[0] for row in build.engine.sql(query).fetchall()), 1))


def _quantities_of_items(build: Build) -> dict[str, str]:
    """i0, i1, … → feature, for numbers and vectors in the table of items."""
    names = build.schema.of_items().keys() - {*build.raw.event_items, *build.raw.kept}
    return {name: feature for name, feature in build.schema.quantities().items() if name in names}


def _check_table(
    build: Build, rows: str, conditions: Mapping[str, str], as_read: str, file: RawFile, bad: Counter[str]
) -> None:
    """Check a file in one pass. A row with several unusable values counts once, for the first of them. ``conditions``:
    column → when it is unusable."""
    selected, earlier = [], "false"
    for name, condition in conditions.items():
        here = f"FILTER (WHERE {condition} AND NOT ({earlier}))"
        selected += [f'count(*) {here} AS "n_{name}"', f'min(source_row) {here} AS "first_{name}"']
        earlier = f"{earlier} OR {condition}"
    found = one(build.engine, f"SELECT {', '.join(selected)} FROM {rows}")
    for name, count, first in sorted(
        zip(conditions, found[::2], found[1::2], strict=True), key=lambda row: row[2] or 0
    ):
        if count:
            build.skip(bad, count, *_explain_value(build, name, as_read, file, first))


def _explain_value(build: Build, name: str, rows: str, file: RawFile, row: int) -> tuple[str, str, str]:
    """Return (reason, location, detail) of the unusable value of column ``name`` in one of the rows as read."""
    value, kind = f"CAST({identifier(name)} AS VARCHAR)", f"typeof({identifier(name)})"
    text, kind = one(build.engine, f"SELECT {value}, {kind} FROM {rows} WHERE source_row = {row}")
    column = build.raw.descriptions.get(name) or ColumnDescription(name, "a value")
    short = text if len(text or "") <= _SHOWN else f"{text[:_SHOWN]}…"
    shown = f"is {repr(short) if kind == 'VARCHAR' else short}" if text else "is empty or of the wrong type"
    quantities = build.schema.quantities()
    is_vector = quantities.get(name) in build.schema.vectors
    width = f" ({vector_width(build, name)} in the first)" if is_vector else ""
    detail = f"{column.label!r} {shown}; allowed is {column.allowed}{width}"
    return f"unusable {column.label if name in quantities else name}", file.place(row), detail


def check_period(build: Build) -> None:
    """Log the period of the events. Raises DataError if the times of a user's own table are probably something else."""
    if build.schema.timestamp is None:
        return
    ends = """min("timestamp") AS first, max("timestamp") AS last, min("time") AS low, max("time") AS high"""
    build.table("period", f"SELECT {ends}, count(*) AS events FROM usable_events")
    shown = "CAST(low AS VARCHAR), CAST(high AS VARCHAR)"
    first, last, low, high, events = one(build.engine, f'SELECT "first", "last", {shown}, events FROM period')
    period = f"the {events:,} events are of {as_date(first).removesuffix(' UTC')} to {as_date(last)}"
    _log.info("%s", period)
    if build.raw.resolve_types is None or build.options.any_times:
        return
    column = build.raw.descriptions["time"]
    is_early, is_late = first < FIRST_LIKELY, last >= LAST_LIKELY
    is_short = last - first < 24 * 3600 and build.base is None
    if events >= _MANY_EVENTS and (is_early or is_late or is_short):
        why = "before 1990" if is_early else "after 2100" if is_late else "within one day"
        raise DataError(
            f"{build.raw.logs[0].path}: {column.label!r} is {low} to {high}, so {period}, {why}. Is it the right "
            "column, in the unit of --time_unit? Dates are like 2024-05-31. If the times are right, add --any_times"
        )


def keep_core(build: Build) -> None:
    """Create the view events, a k-core of users and items with enough events. Raises DataError if it is empty."""
    options = build.options
    if max(options.min_user_events, options.min_item_events) == 1:
        build.engine.view("events", "SELECT * FROM usable_events")
        return
    least = {"user": options.min_user_events, "item": options.min_item_events}
    rounds = build.once("core", lambda: _find_core(build, least))
    for name in least:
        build.engine.show(f"core_{name}s", build.file(f"core_{name}s"))
    kept = " AND ".join(f'"{name}" IN (SELECT id FROM core_{name}s)' for name in least)
    build.engine.view("events", f"SELECT * FROM usable_events WHERE {kept}")
    before, after = (one(build.engine, f"SELECT count(*) FROM {rows}")[0] for rows in ("usable_events", "events"))
    wanted = f"--min_user_events {options.min_user_events} --min_item_events {options.min_item_events}"
    if after == 0:
        raise DataError(f"{wanted} leave no event of {before:,}; ask for fewer events per user and item")
    _log.info("%s: %d of %d events are left, after %d rounds", wanted, after, before, rounds)


def _find_core(build: Build, least: dict[str, int]) -> int:
    """Create the tables core_users and core_items of ids. Returns the number of rounds."""
    rounds, known = 0, ""
    kept: dict[str, int] = {}
    while True:
        found = {}
        for name in ("user", "item"):
            query = f'SELECT "{name}" AS id FROM usable_events {known} GROUP BY 1 HAVING count(*) >= {least[name]}'
            found[name] = build.engine.write(query, build.file(f"core_{name}s"))
            build.engine.show(f"core_{name}s", build.file(f"core_{name}s"))
            known = f'WHERE "{name}" IN (SELECT id FROM core_{name}s)'
        rounds += 1
        if found == kept:
            return rounds
        kept = found
