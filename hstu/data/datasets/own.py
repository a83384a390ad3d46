"""Converts users' own tables, which the options of own_columns.py describe, to RawTables.

All values decide the type of a column, not a sample. A text column holds integers only if all its values are canonical
integers: ``007`` stays text, distinct from ``7``. A time column has the type of most of its values.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hstu.base.errors import DataError
from hstu.data.datasets.own_columns import UNIT_NAMES, InteractionColumns, columns_of, open_table
from hstu.data.datasets.raw import (
    ListsFile,
    RawFile,
    as_integer,
    as_number,
    check_readable,
    identifier,
    literal,
    require_columns,
    select_list,
)
from hstu.data.datasets.spec import SPLIT_NAMES, TIME_UNITS, ColumnDescription, RawTables, RunQuery

_log = logging.getLogger(__name__)

_ID = "an id, int64 or text"
_LINES = "; a user has one line, or each line is one event, 'user item', divided by blanks, tabs or --delimiter"
_ALLOWED = {
    "user": _ID,
    "item": _ID,
    "action": "an integer from 0 up (for half stars, double them)",
    "split": f"{', '.join(SPLIT_NAMES[:-1])} or {SPLIT_NAMES[-1]}",
    "request": _ID,
}
_A_NUMBER = "a finite number, or nothing where it is missing"
_A_VECTOR = "finite numbers, equally many in each row, or nothing where it is missing"
_INTEGERS = frozenset(
    ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT", "UHUGEINT")
)
_DATES = ("DATE", "TIMESTAMP")
_LARGEST = "3.4028234e38"
"""Largest float32."""
_MOST_LABELS = 256


def interactions(columns: InteractionColumns, texts: Collection[str] = (), stored: Collection[str] = ()) -> RawTables:
    """Build RawTables whose types are resolved after reading. Raises DataError for unusable files.

    To add to a store, ``texts`` are those of user and item whose ids are text in it, and ``stored`` the tables, context
    and items, of which it keeps what the files lack.
    """
    schema = columns.schema()
    header = (columns.user, columns.item) if columns.sequences else columns.header
    logs = tuple(open_table(file, columns.delimiter, header, columns.sequences) for file in columns.files)
    wanted = {name: getattr(columns, name) for name in ("user", "item", "action", "time", "split")}
    given = {name: column for name, column in wanted.items() if column}
    context, of_context = _table(columns, columns.context, {"user": columns.user}, schema.of_users())
    items, of_items = _table(columns, columns.items, {"item": columns.item}, schema.of_items())
    titles, _ = _table(columns, columns.titles, {"item": columns.item, "title": columns.title or ""}, {})
    tables = {"context": context, "titles": titles, "item_table": items}
    present = {log.path: [*columns_of(log)] for log in logs}
    features = {"context": schema.of_users(), "items": schema.of_items()}
    in_all = set.intersection(*map(set, present.values()))
    kept = [name for table in stored for name, column in features[table].items() if column not in in_all]
    event_context, event_items = (
        {name: column for name, column in each.items() if name not in (*of_context, *of_items, *kept)}
        for each in features.values()
    )
    of_events = event_context | event_items | schema.of_events()
    for file, names in present.items():
        require_columns(file, names, [*given.values(), *of_events.values()])
    expressions = [*map(_as_text, event_context)]
    expressions += [_feature(columns, name, of_events[name], logs[0]) for name in (*event_items, *schema.of_events())]
    item_values = [_feature(columns, name, column, items[0]) for name, column in of_items.items() if items]
    of_requests = given | ({"request": columns.request} if columns.request else {})
    needed = of_requests | schema.of_events()
    requests = [_table(columns, file, needed, event_items, needs_one=False)[0] for file in columns.request_files]
    return RawTables(
        logs=logs,
        events=select_list(given | of_events) + ", is_usable" * columns.sequences,
        requests=tuple(filter(None, requests)),
        has_request_ids=columns.request is not None,
        tables={name: table for name, table in tables.items() if table},
        event_context=tuple(event_context),
        event_items=tuple(event_items),
        kept=tuple(kept),
        resolve_types=partial(_resolve_types, columns, texts, expressions, [*map(_as_text, of_context)], item_values),
        settings=repr(columns.arguments()),
        descriptions={
            name: ColumnDescription(column, _allowed(columns, name, column))
            for name, column in (of_requests | schema.quantities()).items()
        },
    )


def _table(
    columns: InteractionColumns,
    file: Path | None,
    needed: Mapping[str, str],
    features: Mapping[str, str],
    *,
    needs_one: bool = True,
) -> tuple[tuple[RawFile, str] | None, dict[str, str]]:
    """Open a table, which ``needs_one`` of ``features``, if any. Returns its entry in RawTables and its features."""
    if file is None:
        return None, {}
    if file == columns.items and file.suffix == ".json":
        check_readable(file)
        table: RawFile = ListsFile(path=file, names=(columns.item, columns.item_columns[0]))
    else:
        table = open_table(file, columns.delimiter)
    present = columns_of(table)
    found = {name: column for name, column in features.items() if column in present}
    wanted = features.values() if needs_one and not found else ()
    require_columns(table.path, list(present), [*needed.values(), *wanted])
    return (table, select_list({**needed, **found})), found


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


def _allowed(columns: InteractionColumns, name: str, column: str) -> str:
    if name == "time":
        return f"{UNIT_NAMES[columns.time_unit]} since 1970 (--time_unit), or a date and time like 2024-05-31 12:00:00"
    if name in _ALLOWED:
        return _ALLOWED[name] + _LINES * columns.sequences
    return _A_NUMBER if column in columns.numbers else _A_VECTOR


def _resolve_types(
    columns: InteractionColumns,
    texts: Collection[str],
    of_events: Sequence[str],
    of_context: Sequence[str],
    of_items: Sequence[str],
    run: RunQuery,
    log: str,
) -> dict[str, Any]:
    table = ColumnTypes(run, (*columns.files, *columns.request_files), log, texts)
    user, user_is_integer = table.id("user", columns.user)
    item, item_is_integer = table.id("item", columns.item)
    once = f"CASE WHEN is_usable THEN {user} END" if columns.sequences else user
    selected = [f'{once} AS "user"', f"{item} AS item"]
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
    return {
        "events": ", ".join([*selected, *of_events]),
        "context": ", ".join([of_user, *of_context]),
        "titles": ", ".join([of_item, _as_text("title")]),
        "item_table": ", ".join([of_item, *of_items]),
        "labels": labels,
    }


def _like_events(name: str, is_integer: bool) -> str:
    """SQL of another table's ids in the type of the event ids. Text becomes NULL where event ids are integers."""
    value = as_integer(identifier(name)) if is_integer else f"nullif(CAST({identifier(name)} AS VARCHAR), '')"
    return f"{value} AS {identifier(name)}"


def _as_text(name: str) -> str:
    return f"CAST({identifier(name)} AS VARCHAR) AS {identifier(name)}"


class ColumnTypes:
    """SQL expressions that convert ingested columns to the types of RawTables.events."""

    def __init__(self, run: RunQuery, files: tuple[Path, ...], relation: str, texts: Collection[str] = ()) -> None:
        """``texts``: those of user and item whose ids are text, whatever the values."""
        self._texts = texts
        self._run, self._relation = run, relation
        self._name = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])
        described = run(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        self._types: dict[str, str] = {row[0]: row[1] for row in described}

    def id(self, name: str, column: str) -> tuple[str, bool]:
        """Return (SQL, whether it is BIGINT, not VARCHAR): if all values are canonical int64. Empty text is NULL."""
        kind = self._types[name]
        if kind not in _INTEGERS and kind != "VARCHAR":
            gaps = " (pandas makes integers with gaps decimal: astype('Int64'))" * (kind in ("DOUBLE", "FLOAT"))
            raise DataError(f"{self._name}: ids in {column!r} must be integers or strings, the column is {kind}{gaps}")
        value = identifier(name)
        if kind == "VARCHAR":
            value = f"nullif({value}, '')"
        integer = as_integer(value)
        if name not in self._texts and self._unlike(value, integer) == 0:
            return f"TRY_CAST({value} AS BIGINT)", True  # the same for these values, and faster
        if kind == "VARCHAR" and name not in self._texts:
            self._refuse_decimals(value, column)
        return f"CAST({value} AS VARCHAR)", False

    def _refuse_decimals(self, value: str, column: str) -> None:
        """Raise DataError if all values are numbers and some have a fraction, as in pandas columns with gaps."""
        number = f"({as_number(value)}) IS NOT NULL"
        query = f"SELECT bool_and({number}), min({value}) FILTER (WHERE contains({value}, '.')) FROM {self._relation}"
        ((only_numbers, fraction),) = self._run(query).fetchall()
        if only_numbers and fraction is not None:
            raise DataError(
                f"{self._name}: ids in {column!r} are decimal numbers, such as {fraction}; ids must be integers or "
                "text. Write them without a fraction (pandas: astype('Int64')), or put a letter in front"
            )

    def action(self, column: str) -> tuple[str, tuple[str, ...]]:
        """Return (INTEGER SQL, text of each integer). Texts are numbered alphabetically if none is a number."""
        is_text = self._types["action"] == "VARCHAR"
        number = as_number("action") if is_text else "TRY_CAST(action AS DOUBLE)"
        is_whole = f"{number} = floor({number}) AND abs({number}) < 2147483647"  # 4.0 is an integer, 4.5 is not
        if is_text:
            is_whole += " AND NOT (contains(action, 'e') OR contains(action, 'E'))"  # nor is 1e2
        whole = f"CASE WHEN {is_whole} THEN CAST({number} AS INTEGER) END"
        if not is_text:
            return whole, ()
        text = "nullif(action, '')"
        ((texts, numbers),) = self._run(f"SELECT count({text}), count({number}) FROM {self._relation}").fetchall()
        if numbers or not texts:
            return whole, ()
        query = f"SELECT DISTINCT {text} AS label FROM {self._relation} WHERE label IS NOT NULL ORDER BY label"
        labels = tuple(label for (label,) in self._run(f"{query} LIMIT {_MOST_LABELS + 1}").fetchall())
        if len(labels) > _MOST_LABELS:
            raise DataError(
                f"{self._name}: {column!r} has more than {_MOST_LABELS} different texts, such as {labels[0]!r}; "
                "actions are integers from 0 up, or few texts, such as 'buy' and 'view'. Is it the right column?"
            )
        _log.info("actions in %r: %s", column, ", ".join(f"{number} {label}" for number, label in enumerate(labels)))
        cases = " ".join(f"WHEN {literal(label)} THEN {number}" for number, label in enumerate(labels))
        return f"CASE action {cases} END", labels

    def time(self, column: str, unit: str) -> tuple[str, str]:
        """Return (SQL to sort by, SQL of BIGINT seconds). Numbers are in ``unit``; dates without a zone are UTC. The
        type that fits most values is chosen; the other values become NULL, hence bad rows."""
        value, integer, number = '"time"', as_integer('"time"'), as_number('"time"')
        finite = f"CASE WHEN isfinite({number}) AND abs({number}) < 9e18 THEN {number} END"
        if self._types["time"] == "VARCHAR":  # a cast refuses the blank in "2024-05-31 12:00:00 +0200"
            value = r"""regexp_replace(trim("time"), '\s+([+-]\d\d(:?\d\d)?)$', '\1')"""
        date = f"TRY_CAST({value} AS TIMESTAMPTZ)"
        moment = f"CASE WHEN isfinite({date}) THEN {date} END"
        kinds = (moment,) if self._types["time"].startswith(_DATES) else (integer, finite, moment)
        best = self._best_of(kinds)  # a tie selects integers, which are exact
        if best == moment:
            if unit != "s":
                _log.warning("--time_unit %s has no effect: %r holds dates", unit, column)
            return moment, f"CAST(floor(epoch({moment})) AS BIGINT)"
        per_second = TIME_UNITS[unit]
        if best == finite:
            return finite, f"CAST(floor({finite} / {per_second}) AS BIGINT)"
        if per_second == 1:
            return integer, integer
        # -1: before 1970, refused
        return integer, f"CASE WHEN {integer} < 0 THEN -1 ELSE {integer} // {per_second} END"

    def _best_of(self, kinds: tuple[str, ...]) -> str:
        """The SQL that turns the fewest values into NULL; the first of several."""
        found: dict[int, str] = {}
        for kind in kinds:
            found.setdefault(self._unlike('"time"', kind), kind)
            if 0 in found:
                break  # parsing texts as dates is slow
        return found[min(found)]

    def _unlike(self, value: str, converted: str) -> int:
        condition = f"{value} IS NOT NULL AND ({converted}) IS NULL"
        ((count,),) = self._run(f"SELECT count(*) FROM {self._relation} WHERE {condition}").fetchall()
        return int(count)


def number_value(value: str) -> str:
    """SQL: FLOAT; NULL for an empty value and NaN (also as text), NaN for other text and beyond float32. -0 is 0:
    DuckDB may write either for the other."""
    number = as_number(value)
    missing = f"{value} IS NULL OR trim(CAST({value} AS VARCHAR)) = '' OR coalesce(isnan({number}), false)"
    fits = f"coalesce(abs({number}) <= {_LARGEST}, false)"
    return f"CASE WHEN {missing} THEN NULL WHEN {fits} THEN CAST({number} + 0 AS FLOAT) ELSE 'nan'::FLOAT END"


def vector_value(value: str, elements: str) -> str:
    """SQL: FLOAT[] of a list of numbers or texts; NULL if ``value`` is empty, [NaN] if it is unusable."""
    numbers = f"[{number_value('x')} FOR x IN {elements}]"
    is_missing = f"{value} IS NULL OR trim(CAST({value} AS VARCHAR)) IN ('', '[]')"
    has_gaps = f"len([y FOR y IN {numbers} IF y IS NULL OR isnan(y)]) > 0"
    return f"CASE WHEN {is_missing} THEN NULL WHEN {has_gaps} THEN ['nan'::FLOAT] ELSE {numbers} END"
