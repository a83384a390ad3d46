"""One rank's shard of a dynamic table: assigns rows to ids, initialises them and counts events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from hstu.model.embedding import TableSpec
from hstu.parallel.dynamic.content import Sightings, TableContent, last_evicted, merged, owners
from hstu.parallel.dynamic.create import create_slots
from hstu.parallel.dynamic.hashing import initial_rows, table_key
from hstu.parallel.dynamic.rows import Rows
from hstu.parallel.dynamic.slots import NO_SLOT, Counters

TableReport = dict[str, float]
"""``rows`` and ``capacity`` over all ranks; ``hit_rate``: share of lookups of ids that had a row before their batch;
and the other counters of hstu.parallel.dynamic.slots.Counters."""


class DynamicTable:
    """This rank's shard of a table.

    Its last row is the default row, for all ids without a row. Each lookup first resets it to zeros, which cancels
    updates by the optimizer.
    """

    def __init__(self, spec: TableSpec, seed: int, rows: Rows) -> None:
        """``rows``: live, all zero."""
        assert spec.dynamic is not None
        self.spec = spec
        self.args = spec.dynamic
        self.rows = rows
        self.default_slot = len(rows) - 1
        self.slots = create_slots(spec.name, spec.dynamic, self.default_slot, rows.device)
        self.step = 0
        """Training batches so far."""
        self._counts = torch.zeros(len(fields(Counters)), dtype=torch.int64, device=rows.device)
        self.changed = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        """Last training batch that changed each row."""
        self._key = table_key(seed, spec.name)
        self._default = torch.tensor([self.default_slot], device=rows.device)
        self._one = torch.ones_like(self._default)
        self._default_was_trained = False
        self._kernels = self.slots.kernels

    @property
    def counters(self) -> Counters:
        """Event counts since the last ``pop_figures``; waits for the device."""
        return Counters(*self._counts.tolist())

    def pop_figures(self) -> Tensor:
        """Return rows in use and counters, int64 [7] on the table's device, and reset the counters."""
        figures = torch.cat([self.slots.size(), self._counts])
        self._counts = torch.zeros_like(self._counts)
        return figures

    def assign_rows(self, ids: Tensor) -> Tensor:
        """Assign and return rows, int64 [n], for the ids of the next training batch."""
        self.step += 1
        assigned = self.slots.assign(ids, self.step)
        self._counts += assigned.counts
        if self._kernels is not None:
            self.rows.start(
                assigned.new_slots,
                assigned.insertions,
                self._kernels,
                assigned.new_ids,
                table_key=self._key,
                init_std=self.spec.init_std,
            )
        elif len((assigned := assigned.trimmed()).new_slots):
            new_rows = initial_rows(assigned.new_ids, self.spec.dim, self.spec.init_std, self._key)
            self.rows.initialize(assigned.new_slots, new_rows)
        rows = self._or_default(assigned.slots)
        self.changed[rows] = self.step
        return rows

    def look_up(self, ids: Tensor, *, training: bool) -> Tensor:
        """Return the rows, int64 [n], of ids without assigning new ones. ``training``: rows will be updated."""
        rows = self._or_default(self.slots.lookup(ids))
        if training:
            self.changed[rows] = self.step
        return rows

    def prefetch(self, ids: Tensor) -> None:
        """Load rows of ``ids``, int64 [n], into caches for the next step's lookup. Affects only speed."""
        self.rows.prefetch(self.slots.lookup(ids))

    def clear_default_row(self) -> None:
        """Reset the default row. Call it before every lookup."""
        if self._kernels is not None:
            self.rows.start(self._default, self._one, self._kernels)
        elif self._default_was_trained:
            self._default_was_trained = False
            self.rows.initialize(self._default, self._default.new_zeros(1, self.spec.dim, dtype=torch.float32))

    def content(self) -> TableContent:
        """Return the content to save: views of live tensors, or copies if the table is split."""
        ids, scores = self.slots.content()
        rows, states = self.rows.read(len(ids))
        sightings = self.slots.sightings
        return TableContent(
            policy=self.slots.policy,
            step=self.step,
            ids=ids,
            scores=scores,
            changed=self.changed[: len(ids)],
            rows=rows,
            states=states,
            sightings=None if sightings is None else Sightings(*sightings.content()),
        )

    @torch.no_grad()
    def restore(self, parts: Sequence[TableContent], rank: int, world_size: int) -> int:
        """Load this rank's ids from ``parts`` of a table. Returns how many, in eviction order, found no room."""

        def own(ids: Tensor) -> Tensor:
            return owners(ids, self.args, self.slots.capacity, world_size) == rank

        content = merged([part.select(own(part.ids)) for part in parts]).scored_by(self.slots.policy)
        kept = content.select(last_evicted(content.ids, content.scores, self.slots.capacity))
        self.slots.restore(kept.ids, kept.scores)
        self.step = kept.step
        self.rows.write(kept.rows, kept.states)
        self.changed[: len(kept.ids)] = kept.changed.to(self.changed)
        if self.slots.sightings is not None and kept.sightings is not None:
            sighted = own(kept.sightings.ids)
            ids, scores = kept.sightings.ids[sighted], kept.sightings.scores[sighted]
            newest = last_evicted(ids, scores, self.slots.sightings.capacity)
            self.slots.sightings.restore(ids[newest], scores[newest])
        return len(content.ids) - len(kept.ids)

    def _or_default(self, slots: Tensor) -> Tensor:
        absent = slots == NO_SLOT
        if self._kernels is None:
            self._default_was_trained |= bool(absent.any())
        return torch.where(absent, self.default_slot, slots)


def pop_reports(
    tables: Mapping[str, DynamicTable], sum_over_ranks: Callable[[list[float]], list[float]]
) -> dict[str, TableReport]:
    """Return event counts over all ranks since the last call, and reset them. Collective if there are tables."""
    if not tables:
        return {}
    figures = torch.stack([table.pop_figures() for table in tables.values()]).tolist()  # waits for the device once
    numbers: list[float] = []
    for table, (rows, *counts) in zip(tables.values(), figures, strict=True):
        numbers += [rows, table.slots.capacity, *counts]
    totals = iter(sum_over_ranks(numbers))
    names = ["rows", "capacity", *(field.name for field in fields(Counters))]
    return {table: _report({name: int(next(totals)) for name in names}) for table in tables}


def _report(counts: dict[str, int]) -> TableReport:
    hits, lookups = counts.pop("hits"), counts["lookups"]
    return {**counts, "hit_rate": hits / lookups if lookups else 1.0}


def describe_report(table: str, report: Mapping[str, float]) -> str:
    """Return a report as a log line."""
    rows, capacity = int(report["rows"]), int(report["capacity"])
    text = f"table {table}: {rows:,} of {capacity:,} rows ({rows / capacity:.1%}), hit rate {report['hit_rate']:.1%}"
    counts = {
        "new": report["insertions"],
        "evicted": report["evictions"],
        "lookups below the admission threshold": report["waiting"],
        "lookups without room": report["rejections"],
    }
    return ", ".join([text, *(f"{int(number):,} {name}" for name, number in counts.items() if number)])
