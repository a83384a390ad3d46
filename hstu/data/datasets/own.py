"""Converts users' own tables to RawTables. own_columns.py defines the options, own_types.py the column types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from duckdb import DuckDBPyConnection

from hstu.base.errors import DataError
from hstu.data.datasets.own_columns import InteractionColumns, columns_of, open_table
from hstu.data.datasets.own_types import UNIT_NAMES, ColumnTypes, as_integer, number_value, unit_hint, vector_value
from hstu.data.datasets.raw import RawFile, identifier, literal, require_columns, select_list
from hstu.data.datasets.spec import SPLIT_NAMES, ColumnDescription, RawTables, TypedColumns

_ID = "an id, int64 or text"
_ALLOWED = {
    "user": _ID,
    "item": _ID,
    "action": "an integer from 0 up (for half stars, double them)",
    "split": f"{', '.join(SPLIT_NAMES[:-1])} or {SPLIT_NAMES[-1]}",
    "request": _ID,
}
_A_NUMBER = "a finite number, or nothing where it is missing"
_A_VECTOR = "finite numbers, equally many in each row, or nothing where it is missing"


def interactions(columns: InteractionColumns) -> RawTables:
    """Build RawTables whose types are resolved after reading. Raises DataError for unusable files."""
    schema = columns.schema()
    logs = tuple(open_table(file, columns.delimiter, columns.header) for file in columns.files)
    wanted = {name: getattr(columns, name) for name in ("user", "item", "action", "time", "split")}
    given = {name: column for name, column in wanted.items() if column}
    context, of_context = _table(columns, columns.context, {"user": columns.user}, schema.of_users())
    items, of_items = _table(columns, columns.items, {"item": columns.item}, schema.of_items())
    titles, _ = _table(columns, columns.titles, {"item": columns.item, "title": columns.title or ""}, {})
    event_context = {name: column for name, column in schema.of_users().items() if name not in of_context}
    event_items = {name: column for name, column in schema.of_items().items() if name not in of_items}
    of_events = event_context | event_items | schema.of_events()
    for log in logs:
        require_columns(log.path, list(columns_of(log)), [*given.values(), *of_events.values()])
    expressions = [*map(_as_text, event_context)]
    for name, column in (event_items | schema.of_events()).items():
        expressions.append(_feature(columns, name, column, logs[0]))
    item_values = [_feature(columns, name, column, items[0]) for name, column in of_items.items() if items]
    of_requests = given | ({"request": columns.request} if columns.request else {})
    return RawTables(
        logs=logs,
        events=select_list(given | of_events),
        requests=tuple(
            _request_table(file, columns, of_requests | schema.of_events(), event_items)
            for file in columns.request_files
        ),
        has_request_ids=columns.request is not None,
        context=context,
        event_context=tuple(event_context),
        title_table=titles,
        item_table=items,
        event_items=tuple(event_items),
        resolve_types=partial(_resolve_types, columns, expressions, [*map(_as_text, of_context)], item_values),
        settings=repr(columns.arguments()),
        descriptions={name: _description(columns, name, column) for name, column in of_requests.items()}
        | {
            name: ColumnDescription(column, _A_NUMBER if column in columns.numbers else _A_VECTOR)
            for name, column in schema.quantities().items()
        },
    )


def _table(
    columns: InteractionColumns, file: Path | None, needed: Mapping[str, str], features: Mapping[str, str]
) -> tuple[tuple[RawFile, str] | None, dict[str, str]]:
    """Open a table that must have one of ``features``, if any. Returns its entry in RawTables and its features."""
    if file is None:
        return None, {}
    table = open_table(file, columns.delimiter)
    present = columns_of(table)
    found = {name: column for name, column in features.items() if column in present}
    require_columns(table.path, list(present), [*needed.values(), *([] if found else features.values())])
    return (table, select_list({**needed, **found})), found


def _request_table(
    file: Path, columns: InteractionColumns, needed: Mapping[str, str], of_items: Mapping[str, str]
) -> tuple[RawFile, str]:
    """Open a table of impressions for RawTables.requests. Columns of items are optional."""
    table = open_table(file, columns.delimiter)
    present = columns_of(table)
    require_columns(table.path, list(present), needed.values())
    return table, select_list({**needed, **{name: column for name, column in of_items.items() if column in present}})


def _feature(columns: InteractionColumns, name: str, column: str, table: RawFile) -> str:
    """SQL of an item or event feature. Raises DataError if the type of a Parquet column contradicts the options."""
    kind, separator, value = columns_of(table)[column], columns.lists.get(column), identifier(name)
    is_number, is_vector, is_list = column in columns.numbers, column in columns.vectors, kind.endswith("]")
    fractions, others = ("FLOAT", "DOUBLE", "DECIMAL"), ("DATE", "TIME", "STRUCT", "MAP")
    mistakes = (
        (is_list and is_number, "which is a vector; name it in --vectors, or leave it out of --numbers"),
        (is_list and column in columns.event_columns, "and an event has one value; leave it out"),
        (is_list and separator is not None, "a list by itself; leave it out of --lists"),
        (is_list and kind.startswith(fractions) and not is_vector, f"vectors; add --vectors {column}, or leave it out"),
        (is_number and kind.startswith(others), "which is no number; leave it out of --numbers"),
        (is_vector and not is_list and kind != "VARCHAR", "which is no vector; name it in --numbers"),
        (is_vector and kind == "VARCHAR" and separator is None,
         f"text; say in --lists what separates its numbers, as --lists '{column}=;'"),
    )  # fmt: skip
    for is_wrong, what in mistakes:
        if is_wrong:
            raise DataError(f"{table.path}: {column!r} is {kind}, {what}")
    elements = value if separator is None else f"string_split(CAST({value} AS VARCHAR), {literal(separator)})"
    if is_vector:
        found = vector_value(value, elements)
    elif is_number:
        found = number_value(f"CAST({value} AS INTEGER)" if kind == "BOOLEAN" else value)
    elif is_list or separator is not None:
        found = f"[trim(x) FOR x IN CAST({elements} AS VARCHAR[]) IF trim(x) <> '']"
    else:
        found = f"nullif(CAST({value} AS VARCHAR), 'nan')" if kind in fractions else f"CAST({value} AS VARCHAR)"
    return f"{found} AS {value}"


def _description(columns: InteractionColumns, name: str, column: str) -> ColumnDescription:
    if name != "time":
        return ColumnDescription(column, _ALLOWED[name])
    allowed = f"{UNIT_NAMES[columns.time_unit]} since 1970, or a date and time like 2024-05-31 12:00:00"
    return ColumnDescription(column, allowed, partial(unit_hint, columns.time_unit))


def _resolve_types(
    columns: InteractionColumns,
    of_events: Sequence[str],
    of_context: Sequence[str],
    of_items: Sequence[str],
    engine: DuckDBPyConnection,
    log: str,
) -> TypedColumns:
    table = ColumnTypes(engine, (*columns.files, *columns.request_files), log)
    user, user_is_integer = table.id("user", columns.user)
    item, item_is_integer = table.id("item", columns.item)
    selected = [f'{user} AS "user"', f"{item} AS item"]
    labels: tuple[str, ...] = ()
    if columns.action:
        action, labels = table.action(columns.action)
        selected.append(f"{action} AS action")
    if columns.time:
        time, timestamp = table.time(columns.time, columns.time_unit)
        selected += [f'{time} AS "time"', f'{timestamp} AS "timestamp"']
    if columns.split:
        numbers = " ".join(f"WHEN {literal(name)} THEN {number}" for number, name in enumerate(SPLIT_NAMES))
        selected.append(f'CASE lower(CAST("split" AS VARCHAR)) {numbers} END AS "split"')
    if columns.request:
        selected.append("CAST(request AS VARCHAR) AS request")
    of_user, of_item = _like_events("user", user_is_integer), _like_events("item", item_is_integer)
    tables = {
        "context": [of_user, *of_context],
        "titles": [of_item, _as_text("title")],
        "item_table": [of_item, *of_items],
    }
    return TypedColumns(
        ", ".join([*selected, *of_events]), {name: ", ".join(values) for name, values in tables.items()}, labels
    )


def _like_events(name: str, is_integer: bool) -> str:
    """SQL of another table's ids in the type of the event ids. Text becomes NULL where event ids are integers."""
    value = as_integer(identifier(name)) if is_integer else f"nullif(CAST({identifier(name)} AS VARCHAR), '')"
    return f"{value} AS {identifier(name)}"


def _as_text(name: str) -> str:
    return f"CAST({identifier(name)} AS VARCHAR) AS {identifier(name)}"
