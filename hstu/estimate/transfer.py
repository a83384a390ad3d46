"""The collectives that serve one purpose in a step, and the bytes that they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Transfer:
    """The collectives of a step that serve one purpose."""

    name: str
    kind: str
    """all_reduce, all_gather, reduce_scatter or all_to_all."""
    group: str
    """world, data, shards (the ranks that share the dense part), tensor, context, or samples: the ranks of a tp_cp
    group."""
    ranks: int
    """Size of the group."""
    calls: int
    payload: int
    """Bytes of this rank's inputs to all calls together; of the busiest rank if ranks differ."""
    behind: Literal["backward", "pipeline", "operators", "nothing"] = "nothing"
    """What can hide it: all of backward, the steps before, or the operators up to the first that reads its result."""

    @property
    def wire(self) -> float:
        """Bytes that a rank must send at least: those of a ring for all_reduce, all but its own part for the others."""
        return sum(self.sent(self.ranks))

    def sent(self, on_host: int) -> tuple[float, float]:
        """Bytes that a rank must send (within its host, to other hosts), of whose ranks a host has ``on_host``.

        The ranks of a host first share what leaves it, so that each sends an equal part, and then share what arrives.
        """
        hosts = -(-self.ranks // on_host)
        near, far = on_host - 1, hosts - 1
        match self.kind:
            case "all_reduce":
                factors = 2 * near / on_host, 2 * far / hosts / on_host
            case "all_gather":
                factors = hosts * near, far
            case "reduce_scatter":
                factors = near / on_host, far / hosts / on_host
            case _:  # all_to_all
                factors = near / self.ranks, (self.ranks - on_host) / self.ranks
        return self.payload * factors[0], self.payload * factors[1]
