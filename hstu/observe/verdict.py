"""Which rank ended the run: told from the places of all ranks at two moments."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from hstu.parallel.progress import Place

Places = Mapping[int, Place | None]


def name_the_lost(before: Places, after: Places) -> str | None:
    """The ranks that are dead, frozen or gone, in words; None where all are there.

    A living rank tells its place, anew each time, more than once between the two moments.
    """
    lost, there = [], []
    for rank, place in after.items():
        if place is None:
            lost.append(f"rank {rank} never came up")
        elif place.ended:
            lost.append(f"{place} has left {place.at}")
        elif place == before[rank]:
            seconds = max(0.0, time.time() - place.told_at)
            lost.append(f"{place} is dead or frozen: last seen {seconds:.0f} s ago {place.at}")
        else:
            there.append(place)
    return "; ".join([*lost, f"left: {_crowd(there)}"]) if lost else None


def name_the_stuck(places: Iterable[Place]) -> str:
    """The ranks that the others wait for, in words.

    Who has made fewer marks is behind. Where all have made as many, it is who waits for nobody.
    """
    places = list(places)
    fewest = min(place.marks for place in places)
    stuck = [place for place in places if place.marks == fewest]
    if len(stuck) == len(places):
        stuck = [place for place in places if not place.waiting]
    others = [place for place in places if place not in stuck]
    if not stuck or not others:
        return f"no rank goes on, and none is behind the others: {_crowd(places)}"
    named = "; ".join(f"{place} is stuck {place.at} for {place.idle_s:.0f} s in {place.code}" for place in stuck)
    return f"{named}; {_crowd(others)} wait{'s' if len(others) == 1 else ''} for {'it' if len(stuck) == 1 else 'them'}"


def _crowd(places: Iterable[Place]) -> str:
    """``ranks 0, 1, 2 at iteration 5 (training step), rank 3 at …``."""
    by_place: dict[str, list[str]] = {}
    for place in places:
        by_place.setdefault(place.at, []).append(str(place.rank))
    return ", ".join(f"rank{'s'[: len(ranks) - 1]} {', '.join(ranks)} {at}" for at, ranks in by_place.items())
