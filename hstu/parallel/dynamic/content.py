"""What a dynamic table holds, apart from where: what is saved, moved between ranks and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.parallel.dynamic.hashing import mix
from hstu.parallel.dynamic.slots import Policy, counts_of, in_order, score, steps_of
from hstu.parallel.dynamic.times import Entries, last_of_all


@dataclass(frozen=True)
class Sightings:
    """Ids that were sighted when they had no row. int64 [m]; scores are those of lru."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class TableContent:
    """n ids of a table and all that belongs to them."""

    policy: Policy
    step: int
    """Training batches that the table has seen."""
    ids: Tensor
    """int64 [n]."""
    scores: Tensor
    """int64 [n]."""
    changed: Tensor
    """int64 [n]: the training batch that changed the row last, as an id of the batch or as a negative."""
    rows: Tensor
    """float32 [n, dim]."""
    states: Mapping[str, Tensor]
    """Of the optimizer, by name: [n, dim], or [n] of one number a row."""
    sightings: Sightings | None = None
    times: Entries = ()
    """When the table had seen how many batches; empty where that is not known."""

    def chosen(self, places: Tensor) -> TableContent:
        """The ids at ``places``, a mask [n] or indices, with the same sightings."""
        return replace(
            self,
            ids=self.ids[places],
            scores=self.scores[places],
            changed=self.changed[places],
            rows=self.rows[places],
            states={name: state[places] for name, state in self.states.items()},
        )

    def changed_since(self, step: int) -> TableContent:
        """The ids whose rows have changed after batch ``step``."""
        return self.chosen(self.changed > step)

    def scored_by(self, policy: Policy) -> TableContent:
        """The same with the scores of ``policy``, which have the same counts and steps."""
        scores = score(policy, counts_of(self.policy, self.scores), steps_of(self.policy, self.scores))
        return replace(self, policy=policy, scores=scores)


def merged(parts: Sequence[TableContent]) -> TableContent:
    """Several parts of one table, without ids in common, as one."""
    sightings = [part.sightings for part in parts if part.sightings is not None]
    return TableContent(
        policy=parts[0].policy,
        step=max(part.step for part in parts),
        ids=torch.cat([part.ids for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        changed=torch.cat([part.changed for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        states={name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        sightings=merged_sightings(sightings) if sightings else None,
        times=last_of_all([part.times for part in parts]),
    )


def merged_sightings(parts: Sequence[Sightings]) -> Sightings:
    """Several parts as one."""
    return Sightings(torch.cat([part.ids for part in parts]), torch.cat([part.scores for part in parts]))


def best(ids: Tensor, scores: Tensor, number: int) -> Tensor:
    """Places of the ``number`` ids that would be evicted last, in the order in which they stand."""
    return in_order(scores, ids)[max(0, len(ids) - number) :].sort().values


def owners(ids: Tensor, args: DynamicEmbeddingArgs, local_capacity: int, world_size: int) -> Tensor:
    """The rank that owns each id, int64 [n]: where FBGEMM sends it (hstu.parallel.dynamic.collection.OwnerDist)."""
    words = mix(ids) if args.dist_type == "hash_roundrobin" else ids
    half = (words >> 1) & torch.iinfo(torch.int64).max  # unsigned remainder: of all bits but the last, then of that
    turns = (half % world_size * 2 + (words & 1)) % world_size
    if args.dist_type != "continuous":
        return turns
    in_range = (ids >= 0) & (ids < local_capacity * world_size)
    return torch.where(in_range, ids.div(local_capacity, rounding_mode="floor"), turns)
