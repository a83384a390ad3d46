"""One rank's shard of a dynamic table: gives rows to ids and initialises them, and reports what happened."""

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
"""``rows`` and ``capacity`` over all ranks; ``hit_rate``, the share of lookups whose id had a row before its batch; the
other counters of hstu.parallel.dynamic.slots.Counters."""


class DynamicTable:
    """This rank's shard of a table.

    Its last row is the default row, which stands for all ids without a row. It is reset to zeros before each lookup, so
    an optimizer's updates to it have no effect.
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
        """The last training batch that changed each row."""
        self._key = table_key(seed, spec.name)
        self._default = torch.tensor([self.default_slot], device=rows.device)
        self._one = torch.ones_like(self._default)
        self._default_was_trained = False
        self._kernels = self.slots.kernels

    @property
    def counters(self) -> Counters:
        """What happened since the last ``pop_figures``; waits for the device."""
        return Counters(*self._counts.tolist())

    def pop_figures(self) -> Tensor:
        """int64 [7] on the device of the table: rows in use, and the counters, which are reset."""
        figures = torch.cat([self.slots.size(), self._counts])
        self._counts = torch.zeros_like(self._counts)
        return figures

    def assign_rows(self, ids: Tensor) -> Tensor:
        """Rows, int64 [n], of the ids of the next training batch; new ids get rows if they may."""
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
        """Rows, int64 [n], of ids; gives none to new ids. ``training``: whether the rows will be updated."""
        rows = self._or_default(self.slots.lookup(ids))
        if training:
            self.changed[rows] = self.step
        return rows

    def prefetch(self, ids: Tensor) -> None:
        """Prepare for a lookup of ``ids``, int64 [n], in the next step. Changes nothing but its speed.

        Ids of a batch keep their slots throughout that batch, so they will be looked up in the slots they have now.
        """
        self.rows.prefetch(self.slots.lookup(ids))

    def clear_default_row(self) -> None:
        """Reset the default row; call it before every lookup."""
        if self._kernels is not None:
            self.rows.start(self._default, self._one, self._kernels)
        elif self._default_was_trained:
            self._default_was_trained = False
            self.rows.initialize(self._default, self._default.new_zeros(1, self.spec.dim, dtype=torch.float32))

    def content(self) -> TableContent:
        """What is worth saving: views of the live tensors, or copies if the table is split."""
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
        """Replace the content by those ids of a table, given in ``parts``, that this rank owns.

        Returns how many ids found no room; these are the ones that would be evicted first.
        """

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
    """Report what was counted since the last call, over all ranks, and reset it. Collective if there are tables."""
    if not tables:
        return {}
    figures = torch.stack([table.pop_figures() for table in tables.values()]).tolist()  # the only wait for the device
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
