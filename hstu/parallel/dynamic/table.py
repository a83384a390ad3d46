"""One rank's shard of a dynamic table: assigns rows to ids, initialises them and counts events; and its content.

The content, without the shard's layout, is what is saved, moved between ranks and restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.model.embedding import TableSpec
from hstu.parallel.dynamic.create import create_slots
from hstu.parallel.dynamic.hashing import mix, quantiles_of, table_key
from hstu.parallel.dynamic.rows import Rows
from hstu.parallel.dynamic.slots import NO_SLOT, Counters, Policy, counts_of, eviction_order, score, steps_of

_OF_IDS = "ids", "scores", "rows"
"""Fields of TableContent with an entry per id, besides its states."""
TableReport = dict[str, float]
"""``rows`` and ``capacity`` over all ranks; ``hit_rate``: share of lookups of ids that had a row before their batch;
``expirations``; and the other counters of hstu.parallel.dynamic.slots.Counters."""


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
        self._initial = {
            "table_key": table_key(seed, spec.name),
            "init_std": spec.init_std,
            "quantiles": quantiles_of(self.args.initializer, rows.device),
        }
        self._expired = 0
        """Ids that have expired since the last report."""
        self._default = torch.tensor([self.default_slot], device=rows.device)
        self._one = torch.ones_like(self._default)

    def pop_figures(self) -> Tensor:
        """Return rows in use, counters and expired ids, int64 [8] on the table's device, and reset the counts."""
        figures = torch.cat([self.slots.size(), self._counts, torch.full_like(self._default, self._expired)])
        self._counts, self._expired = torch.zeros_like(self._counts), 0
        return figures

    def assign_rows(self, ids: Tensor, counts: Tensor | None = None) -> Tensor:
        """Assign and return rows, int64 [n], for the ids of the next training batch. ``counts``: see SlotTable."""
        self.step += 1
        self._expire()
        assigned = self.slots.assign(ids, self.step, None if counts is None else counts.long())
        self._counts += assigned.counts
        self.rows.start(assigned.new_slots, assigned.insertions, self.slots.kernels, assigned.new_ids, **self._initial)
        return self._or_default(assigned.slots)

    def _expire(self) -> None:
        """At every tenth of expire_iters, forget the ids that occurred in none of that many batches before this one."""
        limit = self.args.expire_iters
        if limit is None or self.step % -(-limit // 10):
            return
        if self.slots.sightings is not None:
            self.slots.sightings.free_unseen(self.step - limit)
        freed, source, target = self.slots.free_unseen(self.step - limit)
        self._expired += freed
        if len(source):  # a move writes back caches
            self.rows.move(source, target)

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows, int64 [n], of ids without assigning new ones."""
        return self._or_default(self.slots.lookup(ids))

    def prefetch(self, ids: Tensor) -> None:
        """Load rows of ``ids``, int64 [n], into caches for the next step's lookup. Affects only speed."""
        self.rows.prefetch(self.slots.lookup(ids))

    def clear_default_row(self) -> None:
        """Reset the default row. Call it before every lookup."""
        self.rows.start(self._default, self._one, self.slots.kernels)

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
        if self.slots.sightings is not None and kept.sightings is not None:
            sighted = own(kept.sightings.ids)
            ids, scores = kept.sightings.ids[sighted], kept.sightings.scores[sighted]
            newest = last_evicted(ids, scores, self.slots.sightings.capacity)
            self.slots.sightings.restore(ids[newest], scores[newest])
        return len(content.ids) - len(kept.ids)

    def _or_default(self, slots: Tensor) -> Tensor:
        return torch.where(slots == NO_SLOT, self.default_slot, slots)


def pop_reports(
    tables: Mapping[str, DynamicTable], sum_over_ranks: Callable[[list[list[int]]], list[list[int]]]
) -> dict[str, TableReport]:
    """Return event counts over all ranks since the last call, and reset them. Collective if there are tables."""
    if not tables:
        return {}
    figures = torch.stack([table.pop_figures() for table in tables.values()]).tolist()  # waits for the device once
    own = [
        [rows, table.slots.capacity, *counts] for table, (rows, *counts) in zip(tables.values(), figures, strict=True)
    ]
    totals = zip(tables, sum_over_ranks(own), strict=True)
    names = ["rows", "capacity", *(field.name for field in fields(Counters)), "expirations"]
    return {table: _report(dict(zip(names, counts, strict=True))) for table, counts in totals}


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
        "expired": report["expirations"],
        "lookups below the admission threshold": report["waiting"],
        "lookups without room": report["rejections"],
    }
    return ", ".join([text, *(f"{int(number):,} {name}" for name, number in counts.items() if number)])


@dataclass(frozen=True)
class Sightings:
    """Ids that were seen but have no row: int64 [m], with lru scores."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class TableContent:
    """n ids of a table with their data. Checkpoints store the fields under these names."""

    policy: Policy
    step: int
    """Number of training batches so far."""
    ids: Tensor
    """int64 [n]."""
    scores: Tensor
    """int64 [n]."""
    rows: Tensor
    """float32 or bfloat16 [n, dim]."""
    states: Mapping[str, Tensor]
    """Optimizer states by name: float32 [n, dim], or [n] if rowwise."""
    sightings: Sightings | None = None

    def select(self, index: Tensor) -> TableContent:
        """Return the ids at ``index`` (mask [n] or indices), with all sightings."""
        of_ids = {name: getattr(self, name)[index] for name in _OF_IDS}
        return replace(self, **of_ids, states={name: state[index] for name, state in self.states.items()})

    def scored_by(self, policy: Policy) -> TableContent:
        """Convert the scores to ``policy``, with the same counts and steps."""
        scores = score(policy, counts_of(self.policy, self.scores), steps_of(self.policy, self.scores))
        return replace(self, policy=policy, scores=scores)


def merged(parts: Sequence[TableContent]) -> TableContent:
    """Concatenate parts of one table that have no id in common."""
    sightings = [part.sightings for part in parts if part.sightings is not None]
    return TableContent(
        policy=parts[0].policy,
        step=max(part.step for part in parts),
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in _OF_IDS},
        states={name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        sightings=Sightings(torch.cat([s.ids for s in sightings]), torch.cat([s.scores for s in sightings]))
        if sightings
        else None,
    )


def last_evicted(ids: Tensor, scores: Tensor, number: int) -> Tensor:
    """Return the ascending indices of the ``number`` ids that are evicted last."""
    return eviction_order(scores, ids)[max(0, len(ids) - number) :].sort().values


def owners(ids: Tensor, args: DynamicEmbeddingArgs, local_capacity: int, world_size: int) -> Tensor:
    """Return the rank that owns each id, int64 [n]: the rank to which DynamicFeaturesDist sends it."""
    words = mix(ids) if args.dist_type == "hash_roundrobin" else ids
    # The unsigned remainder: twice the remainder of all bits but the last, plus the last bit.
    half = (words >> 1) & torch.iinfo(torch.int64).max
    turns = (half % world_size * 2 + (words & 1)) % world_size
    if args.dist_type != "continuous":
        return turns
    in_range = (ids >= 0) & (ids < local_capacity * world_size)
    return torch.where(in_range, ids.div(local_capacity, rounding_mode="floor"), turns)
