"""Writes vocabularies and features. Values go to the codes of their users and items, so they need no sort."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from hstu.base.errors import DataError
from hstu.data.datasets.raw import as_number, identifier, literal
from hstu.data.datasets.spec import UNKNOWN, USER_FEATURE
from hstu.data.preprocess.base import with_base
from hstu.data.preprocess.ingest import vector_width
from hstu.data.preprocess.state import ROWS_PER_CHUNK, Build, one, utf8_column
from hstu.data.store.layout import Role, vocabulary_stem

_log = logging.getLogger(__name__)

_MANY_NUMBERS = 100
"""A feature with more distinct numbers than this is probably a quantity."""


def write_context(build: Build, num_users: int) -> None:
    """Write the contextual features; "unknown" if a user has no row or an empty value."""
    names = {feature: name for name, feature in build.schema.of_users().items()}
    of_table = [name for name in names.values() if name not in (*build.raw.event_context, *build.raw.kept)]
    if of_table:
        first = f"""SELECT "user", {", ".join(of_table)} FROM context
            QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY source_row) = 1"""
        _find_values(build, "user", first, of_table, "table")
    of_events = _find_event_values(build, "user", build.raw.event_context, names.values(), "events")
    for feature in build.schema.context:
        if feature == USER_FEATURE:
            codes = build.writer.create_sequence(feature, "context", cardinality=num_users, length=num_users)
            codes[:] = np.arange(num_users)
        else:
            name = names[feature]
            rows = f"user_values_of_{'events' if name in of_events else 'table'}"
            _write_categories(build, name, feature, rows, num_users)


def _find_event_values(build: Build, owner: str, given: Sequence[str], names: Collection[str], rows: str) -> list[str]:
    """Create user_ or item_values_of_events: each owner's values in its first event that has one, so that no sample
    shows a later one, or in the base. ``given``: names in the events, of all ``names``. Returns the names found."""
    found = [*given, *(name for name in build.raw.kept if name in names)]
    if found:
        first = "arg_min({0}, row({1})) FILTER (WHERE {2}) AS {0}"
        firsts = [first.format(name, build.order(), _has_value(build, name, rows)) for name in given]
        query = f"SELECT {', '.join([identifier(owner), *firsts])} FROM {rows} GROUP BY 1"
        _find_values(build, owner, with_base(build, owner, found, query), found, "events")
    return found


def _find_values(build: Build, owner: str, rows: str, names: Sequence[str], source: str) -> int:
    """Create user_values_of_table, …: code and values of each user or item in ``rows``. Returns their number."""
    columns = ", ".join(["o.code", *(f"f.{name}" for name in names)])
    query = f'SELECT {columns} FROM ({rows}) f JOIN {owner}s o ON f."{owner}" = o.id'
    return build.table(f"{owner}_values_of_{source}", query)


def write_event_vocabularies(build: Build) -> dict[str, int]:
    """Write the vocabularies of event features, and fill build.event_values. Returns e0, e1, … → cardinality."""
    found, rows = {}, build.shown()
    for name, feature in build.schema.of_events().items():
        if name in build.schema.quantities():
            continue
        value = _value_in_vocabulary(build, feature, name, f"coalesce(nullif({name}, ''), {literal(UNKNOWN)})", rows)
        build.engine.view(f"values_of_{name}", f"SELECT {value} AS id FROM {rows}")
        values = f"SELECT id FROM values_of_{name}" + (f" UNION ALL SELECT id FROM base_{name}" if build.base else "")
        found[name], build.event_values[name] = _write_vocabulary(build, feature, name, values), value
    return found


def check_items(build: Build, num_items: int) -> dict[str, int]:
    """Read the items' first rows and count the items without a row. Raises DataError if no item has a row."""
    if "item_table" not in build.raw.tables:
        known = build.base.store.statistics.get("items_without_row") if build.base else None
        if known is None:
            return {}
        (of_base,) = one(build.engine, "SELECT count(*) FROM base_items")
        return {"items_without_row": known + num_items - of_base}
    names = [name for name in build.schema.of_items() if name not in build.raw.event_items]
    columns = ", ".join(["item", *names])
    build.table("repeated_items", "SELECT item FROM usable_items GROUP BY item HAVING count(*) > 1")
    first = f"""SELECT {columns} FROM usable_items ANTI JOIN repeated_items USING (item)
        UNION ALL SELECT {columns} FROM usable_items SEMI JOIN repeated_items USING (item)
        QUALIFY row_number() OVER (PARTITION BY item ORDER BY source_row) = 1"""
    known = _find_values(build, "item", first, names, "table")
    file, engine = build.raw.tables["item_table"][0].path, build.engine
    if known == 0:
        (theirs,) = one(engine, "SELECT min(item) FROM usable_items")
        (example,) = one(engine, "SELECT min(id) FROM items")
        raise DataError(
            f"{file} has no row for any of the {num_items:,} items of the events: it has items such as {theirs!r}, the "
            f"events have items such as {example!r}. Give the table of these items"
        )
    if without := num_items - known:
        missing = ", and their numbers missing" if build.schema.quantities() else ""
        _log.warning('%s has no row for %d of %d items: their features are "%s"%s',
                     file, without, num_items, UNKNOWN, missing)  # fmt: skip
    return {"items_without_row": without}


def write_item_features(build: Build, num_items: int) -> None:
    """Write the item features that check_items has read; "unknown" or NaN if an item has no value."""
    names = build.schema.of_items()
    of_events = _find_event_values(build, "item", build.raw.event_items, names, build.shown())
    for name, feature in names.items():
        rows = f"item_values_of_{'events' if name in of_events else 'table'}"
        if name in build.schema.quantities():
            _write_numbers(build, name, feature, rows, num_items)
        else:
            _write_categories(build, name, feature, rows, num_items)


def _write_categories(build: Build, name: str, feature: str, rows: str, owners: int) -> None:
    """Write the codes and the vocabulary of a user or item feature. ``rows``: table with code and value."""
    given, is_list = _has_value(build, name, rows), _is_list(build, name, rows)
    value = f"unnest({name}) AS value, generate_subscripts({name}, 1) - 1 AS place" if is_list else f"{name} AS value"
    build.engine.view(f"each_{name}", f"SELECT code, {value} FROM {rows} WHERE {given}")
    (present,) = one(build.engine, f"SELECT count(*) FROM {rows} WHERE {given}")
    value = _value_in_vocabulary(build, feature, name, "value", f"each_{name}")
    build.engine.view(f"ids_of_{name}", f"SELECT * EXCLUDE value, {value} AS id FROM each_{name}")
    values = f"SELECT id FROM ids_of_{name}"
    if present < owners:
        values += f" UNION ALL SELECT {literal(UNKNOWN)}"
    number = _write_vocabulary(build, feature, name, values, is_list)
    offsets = None
    if is_list:
        offsets = build.writer.create_list_offsets(feature, items=owners)
        offsets[0], offsets[1:] = 0, 1
        for batch in _batches(build, f"SELECT code, len({name}) AS value FROM {rows} WHERE {given}"):
            offsets[1 + batch["code"]] = batch["value"]
        np.cumsum(offsets, out=offsets)
    length = owners if offsets is None else int(offsets[-1])
    role: Role = "context" if name.startswith("c") else "item_feature"
    array = build.writer.create_sequence(feature, role, cardinality=number, length=length)
    if present < owners:
        (array[:],) = one(build.engine, f"SELECT code FROM vocabulary_{name} WHERE id = {literal(UNKNOWN)}")
    codes = f"""SELECT e.* EXCLUDE id, CAST(v.code AS INTEGER) AS value
        FROM ids_of_{name} e JOIN vocabulary_{name} v ON e.id = v.id"""
    for batch in _batches(build, codes):
        places = batch["code"] if offsets is None else offsets[batch["code"]] + batch["place"]
        array[places] = batch["value"]


def _write_numbers(build: Build, name: str, feature: str, rows: str, num_items: int) -> None:
    """Write the number or vector of each item; NaN if an item has no row or no value."""
    width = vector_width(build, name)
    length = num_items * width
    array = build.writer.create_sequence(feature, "item_number", cardinality=None, length=length, width=width)
    array[:] = np.nan
    by_item, found = array.reshape(num_items, width), 0
    query = f"SELECT code, {name} AS value FROM {rows} WHERE {name} IS NOT NULL"
    for batch in _batches(build, query, rows_per_batch=max(ROWS_PER_CHUNK // width, 1)):
        by_item[batch["code"]] = batch["value"].reshape(-1, width)
        found += len(batch["code"])
    array.flush()
    if not found:
        raise DataError(f"no item of the events has a value of {feature!r}; leave it out")


def _write_vocabulary(build: Build, feature: str, name: str, values: str, is_list: bool = False) -> int:
    """Write the distinct values of a query's ``id``, ascending; the row number is the code. Returns their number."""
    table = f"vocabulary_{name}"
    number = build.table(table, f"SELECT DISTINCT id FROM ({values}) ORDER BY 1", "code")
    build.writer.write_utf8(vocabulary_stem(feature), *utf8_column(build.engine, f"SELECT id FROM {table}"))
    is_own = build.raw.resolve_types is not None  # features of built-in datasets are declared on purpose
    if is_own and not is_list and number > _MANY_NUMBERS:  # lists have no ranges
        only = f"SELECT bool_and(({as_number('id')}) IS NOT NULL) FROM {table} WHERE id <> {literal(UNKNOWN)}"
        if one(build.engine, only) == (True,):
            _log.warning(
                "column %r has %d different numbers, and each of them becomes a category of its own; --bins %s=10 "
                "groups them into 10 ranges%s",
                feature,
                number,
                feature,
                "" if name.startswith("c") else f", and --numbers {feature} takes them as quantities",
            )
    return number


def _value_in_vocabulary(build: Build, feature: str, name: str, value: str, relation: str) -> str:
    """SQL of a value's entry in the vocabulary: the value itself, or the range of its number."""
    if feature not in build.schema.bins:
        return value
    rows = f"(SELECT {value} AS value FROM {relation})"
    # The numbers of the base are not known any more, only their ranges: these stay, and take new numbers beyond them.
    kept = build.base.store.ranges.get(feature, {}) if build.base and build.keeps(name) else {}
    found: Mapping[str, float] = build.once(f"ranges {name}", lambda: _find_ranges(build, feature, name, rows, kept))
    build.writer.ranges[feature] = found
    number = as_number(value)
    cases = [f"WHEN {number} >= CAST('{start!r}' AS DOUBLE) THEN {literal(key)}" for key, start in found.items()][::-1]
    cases += [f"WHEN {number} IS NOT NULL THEN {literal(key)}" for key in list(kept)[:1]]
    final = ", ".join(map(literal, (UNKNOWN, *kept)))
    return f"CASE WHEN {value} IN ({final}) THEN {value} {' '.join(cases)} ELSE {value} END"


def _find_ranges(build: Build, feature: str, name: str, values: str, kept: Mapping[str, float]) -> Mapping[str, float]:
    ranges, number = build.schema.bins[feature], as_number("value")
    known = f"FROM {values} WHERE value NOT IN ({', '.join(map(literal, (UNKNOWN, *kept)))})"
    (bad,) = one(build.engine, f"SELECT min(value) {known} AND NOT coalesce(isfinite({number}), false)")
    if bad is not None:
        raise DataError(f"--bins {feature}={ranges}: not all values are finite numbers, such as {bad!r}; leave it out")
    if kept:
        return kept
    build.engine.view(f"numbers_of_{name}", f"SELECT {number} AS number {known}")
    query = f"SELECT number, count(*) AS count FROM numbers_of_{name} GROUP BY 1 ORDER BY 1"
    found = build.engine.sql(query).fetchnumpy()
    return ranges_of(np.asarray(found["number"]), np.asarray(found["count"]), ranges)


def ranges_of(numbers: np.ndarray, counts: np.ndarray, ranges: int) -> dict[str, float]:
    """Group ascending, distinct ``numbers``, which occur ``counts`` times, into ranges of about equally many values.

    Returns name ("18..24") → first number, ascending. There are fewer ranges than ``ranges`` if many values are equal.
    """
    ends = np.cumsum(counts)
    if not len(ends):
        return {}
    places = np.ceil((ends[-1] - 1) * (np.arange(ranges) / ranges))
    starts = np.unique(np.searchsorted(ends, places, side="right"))
    found: dict[str, float] = {}
    for start, last in zip(starts, [*(starts[1:] - 1), len(numbers) - 1], strict=True):
        first, end = (f"{numbers[place]:.15g}" for place in (start, last))
        found.setdefault(first if start == last else f"{first}..{end}", float(numbers[start]))
    return found


def _has_value(build: Build, name: str, rows: str) -> str:
    if name in build.schema.quantities():
        return f"{name} IS NOT NULL"
    return f"array_length({name}) > 0" if _is_list(build, name, rows) else f"{name} <> ''"


def _is_list(build: Build, name: str, rows: str) -> bool:
    return str(build.engine.sql(f"SELECT {name} FROM {rows}").types[0]).endswith("[]")


def _batches(build: Build, query: str, rows_per_batch: int = ROWS_PER_CHUNK) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of rows as column → values; vectors are flattened."""
    for batch in build.engine.sql(query).to_arrow_reader(rows_per_batch):
        columns = {name: batch.column(name) for name in batch.schema.names}
        yield {
            name: (values.flatten() if hasattr(values, "flatten") and values.type.num_fields else values).to_numpy(
                zero_copy_only=False
            )
            for name, values in columns.items()
        }
