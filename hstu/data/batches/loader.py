"""Batches in exact order, built in this process or ahead of time in the worker processes of a DataLoader.

Workers receive plans and return batches in the order of the plans, so the order and content of a run are the same for
any number of workers.
"""

from __future__ import annotations

import gc
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hstu.base.errors import DataError, UserError
from hstu.base.processes import end_with_parent
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import BatchPlan

_DEAD_WORKER = re.compile("DataLoader worker.*(exited unexpectedly|is killed)", re.DOTALL)
"""What DataLoader's RuntimeError says where a worker has died."""


def build_loader(
    collator: Callable[[BatchPlan], HSTUBatch],
    sampler: Iterable[BatchPlan],
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[HSTUBatch]:
    """One pass over ``sampler``, as batches. Close or drop the iterator to stop the workers.

    Args:
        workers: processes that build batches; 0 means this one.
        prefetch: batches that each worker keeps ready.
        pin_memory: return batches in pinned memory.

    Raises DataError where the data is damaged or a worker dies.
    """
    loader: DataLoader[Any] = DataLoader(
        _PlannedBatches(collator),
        batch_size=None,
        sampler=sampler,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_follow_the_parent,
        # By default DataLoader seeds the workers from torch's global generator, so every evaluation and every resume
        # would change the dropout of the following steps. No worker draws from torch.
        generator=torch.Generator(),
    )
    return _batches(_start(loader), workers)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers, in this thread; they end with it.

    torch would raise the death of a worker from a signal handler, in whatever line the main thread executes. Without
    the handler it is raised where the next batch is awaited, at most 5 s later.

    A forked worker has what this process has, but not its threads. Were it to collect, say, the process group of an
    earlier run, it would wait for that group's threads for ever. So it never collects what it was born with.
    """
    before = signal.getsignal(signal.SIGCHLD)
    gc.freeze()
    try:
        batches = iter(loader)
    finally:
        gc.unfreeze()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    workers = getattr(batches, "_workers", ())
    for worker in workers:
        worker.terminate = worker.kill  # workers ignore SIGTERM
    # At exit, Python sends SIGTERM to the workers that are left and waits for them.
    Finalize(batches, _kill, args=(workers,), exitpriority=0)
    return batches


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


class _PlannedBatches(Dataset[Any]):
    """A dataset indexed by plans. It returns a UserError, because DataLoader would wrap a raised one in a traceback."""

    def __init__(self, collator: Callable[[BatchPlan], HSTUBatch]) -> None:
        self.collator = collator

    def __getitem__(self, plan: Any) -> HSTUBatch | UserError:
        try:
            return self.collator(plan)
        except UserError as error:
            return error


def _batches(batches: Iterator[Any], workers: int) -> Iterator[HSTUBatch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, RuntimeError) as error:  # the first two: it died as it handed a batch over
            if isinstance(error, RuntimeError) and not _DEAD_WORKER.match(str(error)):
                raise
            raise DataError(
                f"a data worker died ({error}). Most often memory ran out: lower TrainerArgs.data_workers (now "
                f"{workers}) or data_prefetch, or set data_workers = 0 to see the error itself"
            ) from error
        if isinstance(batch, UserError):
            # Stops the workers now. Otherwise the garbage collector reaches them through the error's traceback, after
            # it has removed the queues that stop them: torch 2.13 then waits 5 s per worker.
            del batches
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _follow_the_parent(worker: int) -> None:
    """Let only the training process end this one.

    A terminal, torchrun or a scheduler signals all processes of a run. The training process then still needs batches
    until it has reached the end of its step.
    """
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
