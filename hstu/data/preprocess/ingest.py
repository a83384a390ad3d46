"""A raw file -> a columnar working file, in one pass. Every line that cannot be read is known by its number."""

from __future__ import annotations

from pathlib import Path

import duckdb

from hstu.config.errors import DataError
from hstu.data.preprocess.bad_rows import BadRows
from hstu.data.preprocess.engine import Connection, write_parquet
from hstu.data.preprocess.tables import RawFile

_UNQUOTED, _TOO_LONG = "UNQUOTED VALUE", "LINE SIZE OVER MAXIMUM"
_WHY = {
    "CAST": "value of the wrong type",
    "MISSING COLUMNS": "too few columns",
    "TOO MANY COLUMNS": "too many columns",
    "INVALID ENCODING": "not UTF-8",
}


def ingest(engine: Connection, raw: RawFile, select: str, target: Path, bad: BadRows) -> int:
    """Writes ``select`` of the file's readable rows, in their order, to ``target``; returns how many they are.

    Raises DataError with file and line where a line is unreadable and ``bad`` does not allow to skip it.
    """
    try:
        rows = write_parquet(engine, f"SELECT {select} FROM {raw.relation()}", target)
    except (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException) as error:
        text = str(error)
        if raw.path.name not in text and "GZIP" not in text.upper():
            raise
        raise DataError(f"cannot read {raw.path}: {text.splitlines()[0].partition(': ')[2]}") from error
    if raw.is_text:
        _note_rejects(engine, raw, bad)
    return rows


def _note_rejects(engine: Connection, raw: RawFile, bad: BadRows) -> None:
    try:
        rejects = engine.execute(
            "SELECT count(DISTINCT line), min(line_byte_position), arg_min(error_type::VARCHAR, line_byte_position), "
            "arg_min(error_message, line_byte_position), arg_min(column_name, line_byte_position), "
            f"max(error_type::VARCHAR IN ('{_UNQUOTED}', '{_TOO_LONG}')) FROM reject_errors"
        ).fetchone()
    except duckdb.CatalogException:  # nothing was rejected, so there is no such table
        return
    engine.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    if rejects is None or not rejects[0]:
        return
    number, byte, kind, message, name, swallows = rejects
    place = raw.place_at(byte - 1)  # DuckDB counts from 1
    detail = _explained(kind, message, name)
    if swallows:  # a quote that is never closed takes the lines after it along: how many is not known
        raise DataError(f"{place}: {detail}. The lines after it are lost with it, so it cannot be skipped: correct it")
    bad.add(number, _WHY.get(kind, "unreadable line"), place, detail)


def _explained(kind: str, message: str, name: str | None) -> str:
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
