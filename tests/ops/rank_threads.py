"""Threads of one process that stand for the ranks of a layer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch
from torch import Tensor

from hstu.ops.ranks import Pending, Ranks


class RankThread(Ranks):
    """One of ``count``; ``by_tokens``: each has its part of the tokens, too. One computes at a time."""

    def __init__(
        self, rank: int, count: int, by_tokens: bool, given: list[Tensor], barrier: Barrier, turn: Lock
    ) -> None:
        self.rank, self.count, self.by_tokens = rank, count, by_tokens
        self._given, self._barrier, self._turn = given, barrier, turn

    def gather(self, own: Tensor) -> Tensor:
        self._given[self.rank] = own
        self._wait()
        gathered = torch.stack(self._given)
        self._wait()
        return gathered

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def every_token(self, own: Tensor) -> Pending:
        rows = self.gather(own).flatten(0, 1) if self.by_tokens else own
        return lambda: rows

    def summed(self, shares: Tensor) -> Pending:
        total = self.gather(shares).sum(0)
        own = total.chunk(self.count)[self.rank] if self.by_tokens else total
        return lambda: own

    def sum_over_heads(self, gradient: Tensor) -> Tensor:
        return self.gather(gradient).sum(0)

    def sum_over_tokens(self, gradient: Tensor) -> Tensor:
        return self.gather(gradient).sum(0) if self.by_tokens else gradient


def on_ranks(function: Callable[[RankThread], list[Tensor]], count: int, by_tokens: bool = False) -> list[list[Tensor]]:
    """What ``function`` returns on each of ``count`` ranks."""
    given, barrier, turn = [torch.empty(0)] * count, Barrier(count, timeout=60), Lock()

    def one(rank: int) -> list[Tensor]:
        with turn:
            try:
                return function(RankThread(rank, count, by_tokens, given, barrier, turn))
            except BaseException:
                barrier.abort()  # or the others would wait for this one
                raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
