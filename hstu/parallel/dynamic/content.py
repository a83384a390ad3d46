"""The content of a dynamic table without its layout: saved, moved between ranks and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.parallel.dynamic.hashing import mix
from hstu.parallel.dynamic.slots import Policy, counts_of, eviction_order, score, steps_of


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
    changed: Tensor
    """int64 [n]: last training batch that changed the row, through an id of the batch or a negative."""
    rows: Tensor
    """float32 [n, dim]."""
    states: Mapping[str, Tensor]
    """Optimizer states by name: float32 [n, dim], or [n] if rowwise."""
    sightings: Sightings | None = None

    def select(self, index: Tensor) -> TableContent:
        """Return the ids at ``index`` (mask [n] or indices), with all sightings."""
        return replace(
            self,
            ids=self.ids[index],
            scores=self.scores[index],
            changed=self.changed[index],
            rows=self.rows[index],
            states={name: state[index] for name, state in self.states.items()},
        )

    def changed_since(self, step: int) -> TableContent:
        """Return the ids whose rows changed after batch ``step``."""
        return self.select(self.changed > step)

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
        ids=torch.cat([part.ids for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        changed=torch.cat([part.changed for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
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
