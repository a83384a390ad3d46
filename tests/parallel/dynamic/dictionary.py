"""A SlotTable as a Python dictionary, one id after another, to compare the implementations with."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from hstu.base.hashing import splitmix64


@cache
def hash_of(id_: int) -> int:
    return int(splitmix64(id_)[0])


class DictionaryTable:
    """``held``: id → [count, last step] of the ids that have a slot."""

    def __init__(self, capacity: int, policy: str, admission_threshold: int = 0) -> None:
        self.capacity, self.policy, self.threshold = capacity, policy, admission_threshold
        self.held: dict[int, list[int]] = {}
        self.sightings = DictionaryTable(capacity, "lru") if admission_threshold > 1 else None

    def worth(self, count: int, step: int) -> tuple[int, int]:
        return (step, count) if self.policy == "lru" else (count, step)

    def order(self, id_: int) -> tuple[int, ...]:
        return (*self.worth(*self.held[id_]), hash_of(id_))

    def expire(self, step: int, limit: int) -> list[int]:
        """Forget ids that none of the ``limit`` batches before ``step`` had."""
        gone = [id_ for id_, (_, last) in self.held.items() if step - 1 - last >= limit]
        for id_ in gone:
            del self.held[id_]
        if self.sightings is not None:
            self.sightings.expire(step, limit)
        return gone

    def assign(self, ids: Sequence[int], step: int) -> dict[str, list[int]]:
        return self.add(Counter(ids), step)

    def add(self, counts: Counter[int], step: int) -> dict[str, list[int]]:
        new = []
        for id_, count in counts.items():
            if id_ in self.held:
                self.held[id_] = [self.held[id_][0] + count, step]
            else:
                new.append(id_)
        waiting = [] if self.sightings is None else self.too_rare(new, counts, step)
        admitted = [id_ for id_ in new if id_ not in waiting]
        others = sorted((id_ for id_, (_, last) in self.held.items() if last != step), key=self.order)
        contenders = sorted((self.worth(counts[id_], step) for id_ in admitted), reverse=True)
        contenders = contenders[self.capacity - len(self.held) :]
        others = [] if self.policy == "none" else others
        evicted = [id_ for id_, worth in zip(others, contenders, strict=False) if self.worth(*self.held[id_]) < worth]
        for id_ in evicted:
            del self.held[id_]
        room = self.capacity - len(self.held)
        by_worth = sorted(admitted, key=lambda id_: (counts[id_], hash_of(id_)))
        rejected = by_worth[: max(0, len(admitted) - room)]
        placed = [id_ for id_ in admitted if id_ not in rejected]
        for id_ in placed:
            self.held[id_] = [counts[id_], step]
        return {"placed": placed, "evicted": evicted, "waiting": waiting, "rejected": rejected}

    def too_rare(self, new: list[int], counts: Counter[int], step: int) -> list[int]:
        assert self.sightings is not None
        self.sightings.add(Counter({id_: counts[id_] for id_ in new}), step)
        sighted = {id_: self.sightings.held.get(id_, [counts[id_]])[0] for id_ in new}
        return [id_ for id_ in new if sighted[id_] < self.threshold]
