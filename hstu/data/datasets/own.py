"""Users' own interactions, tables with one row per event, as raw tables.

own_columns.py holds what users say of the columns and opens the files, own_types.py decides which type a column has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from duckdb import DuckDBPyConnection

from hstu.data.datasets.own_columns import InteractionColumns, columns_of, open_table
from hstu.data.datasets.own_types import (
    A_NUMBER,
    A_VECTOR,
    TIME_UNITS,
    ColumnTypes,
    as_integer,
    event_value,
    feature_value,
    number_value,
    numbered,
    split_number,
    unit_hint,
    vector_value,
)
from hstu.data.datasets.raw import RawFile, identifier, require_columns, select_list
from hstu.data.datasets.spec import SPLIT_NAMES, ColumnDescription, RawTables, TypedColumns

_ID = "an id, int64 or text"
_ALLOWED = {
    "user": _ID,
    "item": _ID,
    "action": "an integer from 0 up (for half stars, double them)",
    "split": f"{', '.join(SPLIT_NAMES[:-1])} or {SPLIT_NAMES[-1]}",
    "request": _ID,
}


def interactions(columns: InteractionColumns) -> RawTables:
    """The tables as SQL; their types are resolved once they are read. Raises DataError for unusable files."""
    logs = tuple(open_table(file, columns.delimiter, columns.header) for file in columns.files)
    wanted = {name: getattr(columns, name) for name in ("user", "item", "action", "time", "split")}
    given = {name: column for name, column in wanted.items() if column}
    context, from_context = _context_table(columns)
    event_context = {name: column for name, column in _features(columns).items() if name not in from_context}
    item_table, item_features = _item_table(columns)
    features = numbered("i", columns.item_columns)
    event_items = {name: column for name, column in features.items() if name not in item_features}
    event_features = numbered("e", columns.event_columns)
    wanted_of_events = event_context | event_items | event_features
    for log in logs:
        require_columns(log.path, list(columns_of(log)), [*given.values(), *wanted_of_events.values()])
    expressions = _of_events(columns, logs[0], event_items, event_features)
    of_requests = given | ({"request": columns.request} if columns.request else {})
    return RawTables(
        logs=logs,
        events=select_list(given | wanted_of_events),
        requests=tuple(
            _request_table(file, columns, of_requests | event_features, event_items) for file in columns.request_files
        ),
        has_request_ids=columns.request is not None,
        context=context,
        event_context=tuple(event_context),
        title_table=_title_table(columns),
        item_table=item_table,
        event_items=tuple(event_items),
        resolve_types=partial(
            _resolve_types, columns, [*map(_as_text, event_context), *expressions], from_context, item_features
        ),
        settings=repr(columns.arguments()),
        descriptions={name: _description(columns, name, column) for name, column in of_requests.items()}
        | {
            name: ColumnDescription(column, A_NUMBER if column in columns.numbers else A_VECTOR)
            for name, column in (features | event_features).items()
            if column in (*columns.numbers, *columns.vectors)
        },
    )


def _request_table(
    file: Path, columns: InteractionColumns, needed: Mapping[str, str], of_items: Mapping[str, str]
) -> tuple[RawFile, str]:
    """A table of impressions as RawTables.requests describes it; of the columns of items those that it has."""
    table = open_table(file, columns.requests_delimiter or columns.delimiter, columns.requests_header)
    present = columns_of(table)
    require_columns(table.path, list(present), needed.values())
    return table, select_list({**needed, **{name: column for name, column in of_items.items() if column in present}})


def _features(columns: InteractionColumns) -> dict[str, str]:
    """c0, c1, … → its column, for the contextual features but the user."""
    return numbered("c", (column for column in columns.context_columns if column != columns.user))


def _context_table(columns: InteractionColumns) -> tuple[tuple[RawFile, str] | None, tuple[str, ...]]:
    """The table of users as RawTables.context describes it, and which of c0, c1, … are columns of it."""
    if columns.context is None:
        return None, ()
    table = open_table(columns.context, columns.context_delimiter or columns.delimiter, columns.context_header)
    present, features = list(columns_of(table)), _features(columns)
    found = {name: column for name, column in features.items() if column in present}
    require_columns(table.path, present, [columns.user, *([] if found else features.values())])
    return (table, select_list({"user": columns.user} | found)), tuple(found)


def _title_table(columns: InteractionColumns) -> tuple[RawFile, str] | None:
    if columns.titles is None or columns.title is None:
        return None
    table = open_table(columns.titles, columns.titles_delimiter or columns.delimiter, columns.titles_header)
    require_columns(table.path, list(columns_of(table)), [columns.item, columns.title])
    return table, select_list({"item": columns.item, "title": columns.title})


def _item_table(columns: InteractionColumns) -> tuple[tuple[RawFile, str] | None, dict[str, str]]:
    """The table of items as RawTables.item_table describes it, and SQL of those of i0, i1, … that it has."""
    if columns.items is None:
        return None, {}
    table = open_table(columns.items, columns.items_delimiter or columns.delimiter, columns.items_header)
    kinds, features = columns_of(table), numbered("i", columns.item_columns)
    found = {name: column for name, column in features.items() if column in kinds}
    require_columns(table.path, list(kinds), [columns.item, *([] if found else features.values())])
    values = {name: _value(columns, name, column, kinds[column], table.path) for name, column in found.items()}
    return (table, select_list({"item": columns.item} | found)), values


def _of_events(
    columns: InteractionColumns, log: RawFile, items: Mapping[str, str], events: Mapping[str, str]
) -> Iterable[str]:
    """SQL of the features of items and of events that are columns of the interactions."""
    kinds = columns_of(log) if items or events else {}
    for name, column in items.items():
        yield _value(columns, name, column, kinds[column], log.path)
    for name, column in events.items():
        of_event = number_value if column in columns.numbers else event_value
        yield of_event(name, column, kinds[column], log.path)


def _value(columns: InteractionColumns, name: str, column: str, kind: str, file: Path) -> str:
    """SQL of a feature of the items."""
    if column in columns.numbers:
        return number_value(name, column, kind, file)
    as_sql = vector_value if column in columns.vectors else feature_value
    return as_sql(name, column, kind, columns.lists.get(column), file)


def _description(columns: InteractionColumns, name: str, column: str) -> ColumnDescription:
    if name != "time":
        return ColumnDescription(column, _ALLOWED[name])
    unit = TIME_UNITS.get(columns.time_unit, TIME_UNITS["s"])
    allowed = f"{unit.name} since 1970, or a date and time like 2024-05-31 12:00:00"
    return ColumnDescription(column, allowed, partial(unit_hint, columns.time_unit))


def _resolve_types(
    columns: InteractionColumns,
    of_events: Sequence[str],
    from_context: Sequence[str],
    of_items: Mapping[str, str],
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
        selected.append(f'{split_number()} AS "split"')
    if columns.request:
        selected.append("CAST(request AS VARCHAR) AS request")
    selected += of_events
    context = titles = items = None
    if columns.context:
        context = ", ".join([_like_events("user", user_is_integer), *map(_as_text, from_context)])
    if columns.titles:
        titles = f"{_like_events('item', item_is_integer)}, {_as_text('title')}"
    if columns.items:
        items = ", ".join([_like_events("item", item_is_integer), *of_items.values()])
    return TypedColumns(", ".join(selected), context, titles, items, labels)


def _like_events(name: str, is_integer: bool) -> str:
    """The ids of another table as events have them. A text beside integers becomes NULL: nothing matches it."""
    value = as_integer(identifier(name)) if is_integer else f"nullif(CAST({identifier(name)} AS VARCHAR), '')"
    return f"{value} AS {identifier(name)}"


def _as_text(name: str) -> str:
    return f"CAST({identifier(name)} AS VARCHAR) AS {identifier(name)}"
