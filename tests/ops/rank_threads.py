"""Threads of one process that stand for the ranks of a layer."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch
from torch import Tensor

from hstu.ops.comm import LayerComm, Pending, TokenSets


class RankThread(LayerComm):
    """One of ``size`` ranks, of which one computes at a time.

    ``parallel``: "tensor", "sequence" (each has its part of the tokens, too) or "context".
    """

    def __init__(self, rank: int, size: int, parallel: str, given: list[Tensor], barrier: Barrier, turn: Lock) -> None:
        self.rank, self.sequence_parallel = rank, parallel == "sequence"
        self.tp_size, self.cp_size = (1, size) if parallel == "context" else (size, 1)
        self._given, self._barrier, self._turn = given, barrier, turn

    def all_gather(self, own: Tensor) -> Tensor:
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

    def all_gather_tokens(self, own: Tensor) -> Pending:
        rows = self.all_gather(own).flatten(0, 1) if self.sequence_parallel else own
        return lambda: rows

    def reduce_tokens(self, partial: Tensor) -> Pending:
        if self.tp_size == 1:
            return lambda: partial
        total = self.all_gather(partial).sum(0)
        own = total.chunk(self.tp_size)[self.rank] if self.sequence_parallel else total
        return lambda: own

    def tokens_to_heads(self, own: Tensor, tokens: TokenSets) -> Pending:
        if self.cp_size == 1:
            return lambda: own
        heads = self.all_gather(own).flatten(0, 1).chunk(self.cp_size, 1)[self.rank]
        return lambda: heads

    def heads_to_tokens(self, own: Tensor, tokens: TokenSets, out: Tensor | None = None) -> Pending:
        if self.cp_size > 1:
            own = torch.cat([*self.all_gather(own)], 1).chunk(self.cp_size)[self.rank]
        return super().heads_to_tokens(own, tokens, out)

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        if self.tp_size == 1:
            return gradient
        return self.all_gather(gradient).sum(0)

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        return self.all_gather(gradient).sum(0) if self.sequence_parallel else gradient


def on_ranks(function: Callable[[RankThread], list[Tensor]], size: int, parallel: str = "tensor") -> list[list[Tensor]]:
    """What ``function`` returns on each of ``size`` ranks."""
    given, barrier, turn = [torch.empty(0)] * size, Barrier(size, timeout=60), Lock()

    def one(rank: int) -> list[Tensor]:
        with turn:
            try:
                return function(RankThread(rank, size, parallel, given, barrier, turn))
            except BaseException:
                barrier.abort()  # or the others would wait for this one
                raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
