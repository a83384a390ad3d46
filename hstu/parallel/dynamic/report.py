"""What has become of a dynamic table's ids, for the log and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, fields

from hstu.parallel.dynamic.slots import Counters
from hstu.parallel.dynamic.table import DynamicTable

TableReport = dict[str, float]
"""rows, capacity: of all ranks. hit_rate: share of the looked-up ids that had a row before their batch. The other
counters of hstu.parallel.dynamic.slots.Counters as they are."""


def take_reports(
    tables: Mapping[str, DynamicTable], sum_over_ranks: Callable[[list[float]], list[float]]
) -> dict[str, TableReport]:
    """A report a table on what was counted since the last time, over all ranks. Collective where there are tables."""
    if not tables:
        return {}
    numbers: list[float] = []
    for table in tables.values():
        numbers += [table.slots.size, table.slots.capacity, *astuple(table.counters)]
        table.counters = Counters()
    totals = iter(sum_over_ranks(numbers))
    names = ["rows", "capacity", *(field.name for field in fields(Counters))]
    return {table: _report({name: next(totals) for name in names}) for table in tables}


def _report(numbers: dict[str, float]) -> TableReport:
    hits, lookups = numbers.pop("hits"), numbers["lookups"]
    whole: TableReport = {name: int(number) for name, number in numbers.items()}
    return whole | {"hit_rate": hits / lookups if lookups else 1.0}


def describe(table: str, report: Mapping[str, float]) -> str:
    """A report as a line of the log."""
    rows, capacity = int(report["rows"]), int(report["capacity"])
    text = f"table {table}: {rows:,} of {capacity:,} rows ({rows / capacity:.1%}), hit rate {report['hit_rate']:.1%}"
    counts = {
        "new": report["insertions"],
        "evicted": report["evictions"],
        "lookups below the admission threshold": report["waiting"],
        "lookups without room": report["rejections"],
    }
    return ", ".join([text, *(f"{int(number):,} {name}" for name, number in counts.items() if number)])
