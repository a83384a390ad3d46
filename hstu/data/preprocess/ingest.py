"""First stages: raw files become columnar working files, their values are checked, and rare users and items left out.

Left out are users and items with few events, again and again, until all that is left has enough (k-core filters).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.raw import COMPRESSIONS, RawFile, identifier, parquet_rows, write_with_uniform_lines
from hstu.data.datasets.spec import ColumnDescription
from hstu.data.preprocess.engine import Connection, one, write_parquet
from hstu.data.preprocess.state import READING, BadRows, BuildOptions, BuildState

_UNQUOTED, _TOO_LONG = "UNQUOTED VALUE", "LINE SIZE OVER MAXIMUM"
_MIXED_LINE_ENDS = "CSV Parser state machine reached an invalid state"
"""What DuckDB says about a file of which some lines end in CR LF and some in LF."""
_SHOWN = 80
"""Characters of a value that a message shows."""
_REASONS = {
    "CAST": "value of the wrong type",
    "MISSING COLUMNS": "too few columns",
    "TOO MANY COLUMNS": "too many columns",
    "INVALID ENCODING": "not UTF-8",
}


def read_files(state: BuildState) -> None:
    """Writes the logs and the tables to where BuildState.typed_log, typed_context, … read them."""
    for number, (log, columns) in enumerate(state.raw.parts):
        _read(state, f"log_{number}", log, columns, READING * log.path.stat().st_size)
    if state.raw.context is not None:
        _read(state, "context", *state.raw.context, 0)
    if state.raw.title_file is not None:
        state.commit_source(state.raw.title_file)
    if state.raw.title_table is not None:
        _read(state, "titles", *state.raw.title_table, 0)
    if state.raw.item_table is not None:
        _read(state, "item_table", *state.raw.item_table, READING * state.raw.item_table[0].path.stat().st_size)
    if state.raw.item_rows is not None:
        _write_item_rows(state, state.raw.item_rows)
    if state.raw.resolve_types is not None and "typed" not in state.writer.journal:
        engine, events = state.engine, state.ingested_logs()
        typed = state.raw.resolve_types(engine, events)
        for part in range(len(state.raw.parts)):
            rows = f'SELECT {typed.events} FROM {events} WHERE part = {part} ORDER BY "row"'
            write_parquet(engine, rows, state.file(f"typed_log_{part}"))
        tables = (("context", typed.context), ("titles", typed.titles), ("item_table", typed.items))
        for name, select in tables:
            if select is not None:
                rows = f'SELECT {select} FROM {state.numbered(name)} ORDER BY "row"'
                write_parquet(engine, rows, state.file(f"typed_{name}"))
        state.writer.journal.commit("typed", {"labels": typed.labels})


def _write_item_rows(state: BuildState, rows: Mapping[str, Sequence[Any]]) -> None:
    kinds = {name: "VARCHAR[]" if isinstance(values[0], list) else "VARCHAR" for name, values in rows.items()}
    selected = ", ".join(f"CAST({name} AS {kind}) AS {name}" for name, kind in (kinds | {"item": "BIGINT"}).items())
    state.engine.register("item_rows", pd.DataFrame(rows))
    write_parquet(state.engine, f"SELECT {selected} FROM item_rows", state.file("typed_item_table"))


def _read(state: BuildState, name: str, file: RawFile, select: str, effort: float) -> None:
    journal = state.writer.journal
    if name in journal:
        state.progress.skip(effort)
    else:
        bad = state.bad_rows()
        with state.progress.stage(f"reading {file.path.name}", effort, state.engine):
            _ingest(state.engine, file, select, state.file(name), bad)
        state.commit_source(file.path)
        journal.commit(name, bad.counts)
    state.skipped.update(journal[name])


def _ingest(engine: Connection, raw: RawFile, select: str, target: Path, bad: BadRows) -> None:
    """Writes ``select`` of the file's readable rows, in their order, to ``target``.

    Raises DataError with file and line for an unreadable line that ``bad`` does not allow to skip.
    """
    uniform = replace(raw, path=target.with_suffix(".lines"))
    try:
        try:
            write_parquet(engine, f"SELECT {select} FROM {raw.relation()}", target)
            _count_rejects(engine, raw, raw, bad)
        except duckdb.InvalidInputException as error:
            if _MIXED_LINE_ENDS not in str(error):
                raise
            write_with_uniform_lines(raw.path, uniform.path)
            write_parquet(engine, f"SELECT {select} FROM {uniform.relation()}", target)
            _count_rejects(engine, raw, uniform, bad)
    except (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException) as error:
        text = str(error)
        if raw.path.name not in text and not any(kind.upper() in text.upper() for kind in COMPRESSIONS.values()):
            raise
        raise DataError(f"cannot read {raw.path}: {text.splitlines()[0].partition(': ')[2]}") from error
    finally:
        uniform.path.unlink(missing_ok=True)


def _count_rejects(engine: Connection, raw: RawFile, read: RawFile, bad: BadRows) -> None:
    """``read``: the file that DuckDB has read, which has the lines of ``raw``."""
    if not raw.is_text:
        return
    try:
        rejects = one(
            engine,
            "SELECT count(DISTINCT line), min(line_byte_position), arg_min(error_type::VARCHAR, line_byte_position), "
            "arg_min(error_message, line_byte_position), arg_min(column_name, line_byte_position), "
            f"max(error_type::VARCHAR IN ('{_UNQUOTED}', '{_TOO_LONG}')) FROM reject_errors",
        )
    except duckdb.CatalogException:  # without a rejected line there is no such table
        return
    engine.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    number, byte, kind, message, name, hides_lines = rejects
    if not number:
        return
    location = f"{raw.path}:{read.line_at(byte - 1)}"  # DuckDB counts from 1
    detail = _explain(kind, message, name)
    if hides_lines:  # an unclosed quote also makes an unknown number of further lines unreadable
        raise DataError(
            f"{location}: {detail}. The lines after it cannot be read either, so it cannot be skipped: correct it"
        )
    bad.add(number, _REASONS.get(kind, "unreadable line"), location, detail)


def _explain(kind: str, message: str, name: str | None) -> str:
    """DuckDB's message in one line and in a user's words."""
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
    return message.splitlines()[0].replace("Expected Number of Columns:", "expected columns:").replace("Found", "found")


def check_rows(state: BuildState) -> None:
    """Raises DataError for the first unusable event or repeated user of the context, unless they may be skipped."""
    journal = state.writer.journal
    if "checked" not in journal:
        bad = state.bad_rows()
        for number, (log, _) in enumerate(state.raw.parts):
            _check_log(state, number, log, bad)
        _check_context(state, bad)
        _check_all_items(state, bad)
        _check_numbers(state, bad)
        (usable,) = one(state.engine, f"SELECT count(*) FROM {state.events()}")
        if usable == 0:
            raise DataError(f"{', '.join(str(log.path) for log in state.raw.logs)}: no events")
        journal.commit("checked", bad.counts)
    state.skipped.update(journal["checked"])


def _check_log(state: BuildState, number: int, log: RawFile, bad: BadRows) -> None:
    """One pass over the file. A row with several unusable values counts once, for the first of them."""
    conditions = state.unusable_values(number)
    selected, earlier = [], "false"
    for name, condition in conditions.items():
        here = f"FILTER (WHERE {condition} AND NOT ({earlier}))"
        selected += [f'count(*) {here} AS "n_{name}"', f'min("row") {here} AS "first_{name}"']
        earlier = f"{earlier} OR {condition}"
    found = one(state.engine, f"SELECT {', '.join(selected)} FROM {state.typed_log(number)}")
    rows = dict(zip(conditions, zip(found[::2], found[1::2], strict=True), strict=True))
    for name, (count, first) in sorted(rows.items(), key=lambda item: item[1][1] or 0):
        if count:
            reason, detail = _explain_value(state, name, state.ingested_log(number), first)
            bad.add(count, reason, log.place(first), detail)


def _explain_value(state: BuildState, name: str, rows: str, row: int) -> tuple[str, str]:
    """(reason, detail) of the unusable value of a column in one of the rows as read."""
    value, kind = f"CAST({identifier(name)} AS VARCHAR)", f"typeof({identifier(name)})"
    text, kind = one(state.engine, f'SELECT {value}, {kind} FROM {rows} WHERE "row" = {row}')
    column = state.raw.descriptions.get(name) or ColumnDescription(name, "a value")
    short = text if len(text or "") <= _SHOWN else f"{text[:_SHOWN]}…"
    shown = f"is {repr(short) if kind == 'VARCHAR' else short}" if text else "is empty or of the wrong type"
    width = f" ({state.width(name)} in the first)" if state.numbers().get(name) in state.schema.vectors else ""
    detail = f"{column.label!r} {shown}; allowed is {column.allowed}{width}{column.hint(text or '')}"
    return f"unusable {column.label if name in state.numbers() else name}", detail


def _check_context(state: BuildState, bad: BadRows) -> None:
    """Of several rows for one user, those after the first are bad."""
    context = state.typed_context()
    if context is None or state.raw.context is None:
        return
    repeated = f"""SELECT "user", "row" FROM {context} WHERE "user" IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY "row") > 1"""
    count, user, row = one(state.engine, f'SELECT count(*), arg_min("user", "row"), min("row") FROM ({repeated})')
    if count:
        bad.add(count, "repeated user", state.raw.context[0].place(row), f"another row for user {user!r}")


def _check_numbers(state: BuildState, bad: BadRows) -> None:
    """Rows of the table of items whose numbers are none, and vectors of another width than the first, are bad rows.

    Raises DataError where a number has no value at all.
    """
    for name, feature in state.numbers().items():
        rows = state.typed_logs()
        if name in state.item_features() and name not in state.raw.event_items:
            rows = state.all_typed_items()
            condition = state.unusable_number(name)
            count, row = one(state.engine, f'SELECT count(*), min("row") FROM {rows} WHERE {condition}')
            if count and state.raw.item_table is not None:
                reason, detail = _explain_value(state, name, state.numbered("item_table"), row)
                bad.add(count, reason, state.raw.item_table[0].place(row), detail)
        (known,) = one(state.engine, f"SELECT count({name}) FROM {rows}")
        if not known:
            raise DataError(f"{feature!r} is empty in every row; leave it out")


def _check_all_items(state: BuildState, bad: BadRows) -> None:
    """Items of the titles, or of the table of items, that cannot be items of events are bad rows, if all are wanted."""
    tables = (
        ("titles", state.raw.title_table, state.typed_titles(), "unusable item of the titles"),
        ("item_table", state.raw.item_table, state.typed_items(), "unusable item of the items"),
    )
    for name, table, typed, reason in tables if state.options.all_items else ():
        if table is None:
            continue
        count, row = one(state.engine, f'SELECT count(*), min("row") FROM {typed} WHERE item IS NULL')
        if count:
            query = f'SELECT CAST(item AS VARCHAR) FROM {state.numbered(name)} WHERE "row" = {row}'
            (text,) = one(state.engine, query)
            shown = f"{text!r}, and the ids of the events are integers" if text else "empty"
            label = state.raw.descriptions["item"].label
            bad.add(count, reason, table[0].place(row), f"{label!r} is {shown}")


_log = logging.getLogger(__name__)
_STAGE = "core"


def check_filters(options: BuildOptions) -> None:
    """Raises ConfigError for numbers of events below 1."""
    for option in ("min_user_events", "min_item_events"):
        if (least := getattr(options, option)) < 1:
            raise ConfigError(f"--{option} {least}: at least 1, which leaves out nothing")


def keep_core(state: BuildState) -> None:
    """Leaves out the events of users and items that have too few of them. BuildState.events then lacks these.

    Raises DataError where nothing is left.
    """
    options, journal = state.options, state.writer.journal
    if max(options.min_user_events, options.min_item_events) == 1 or _STAGE in journal:
        return
    (before,) = one(state.engine, f"SELECT count(*) FROM {state.usable_events()}")
    kept = {"user": -1, "item": -1}
    rounds, changed = 0, True
    while changed:
        found = {"user": _keep(state, "user", rounds > 0, options.min_user_events)}
        found["item"] = _keep(state, "item", True, options.min_item_events)
        rounds, changed, kept = rounds + 1, found != kept, found
    journal.commit(_STAGE)  # from here on, state.events() is what is kept
    (after,) = one(state.engine, f"SELECT count(*) FROM {state.events()}")
    wanted = f"--min_user_events {options.min_user_events} --min_item_events {options.min_item_events}"
    if after == 0:
        raise DataError(f"{wanted} leave no event of {before:,}; ask for fewer events per user and item")
    _log.info("%s: %d of %d events are left, after %d rounds", wanted, after, before, rounds)


def _keep(state: BuildState, name: str, others_known: bool, least: int) -> int:
    """Writes the ids with ``least`` events among those whose other id was kept before; returns their number."""
    other = "item" if name == "user" else "user"
    known = f'WHERE "{other}" IN (SELECT id FROM {parquet_rows(state.core_file(other))})' if others_known else ""
    query = f'SELECT "{name}" AS id FROM {state.usable_events()} {known} GROUP BY 1 HAVING count(*) >= {least}'
    return write_parquet(state.engine, query, state.core_file(name))
