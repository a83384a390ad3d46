"""Threads of one process that stand for the ranks of a layer."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch
from torch import Tensor

from hstu.ops.comm import Pending, TensorParallelComm


class RankThread(TensorParallelComm):
    """One of ``size`` ranks; ``sequence_parallel``: each has its part of the tokens, too. One computes at a time."""

    def __init__(
        self, rank: int, size: int, sequence_parallel: bool, given: list[Tensor], barrier: Barrier, turn: Lock
    ) -> None:
        self.rank, self.size, self.sequence_parallel = rank, size, sequence_parallel
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
        total = self.all_gather(partial).sum(0)
        own = total.chunk(self.size)[self.rank] if self.sequence_parallel else total
        return lambda: own

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        return self.all_gather(gradient).sum(0)

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        return self.all_gather(gradient).sum(0) if self.sequence_parallel else gradient


def on_ranks(
    function: Callable[[RankThread], list[Tensor]], size: int, sequence_parallel: bool = False
) -> list[list[Tensor]]:
    """What ``function`` returns on each of ``size`` ranks."""
    given, barrier, turn = [torch.empty(0)] * size, Barrier(size, timeout=60), Lock()

    def one(rank: int) -> list[Tensor]:
        with turn:
            try:
                return function(RankThread(rank, size, sequence_parallel, given, barrier, turn))
            except BaseException:
                barrier.abort()  # or the others would wait for this one
                raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
