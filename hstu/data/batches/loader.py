"""Batches in the exact order of the plans, built here or ahead of time by any number of DataLoader workers."""

import gc
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hstu.base.errors import DataError, UserError
from hstu.base.processes import end_with_parent
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import BatchPlan, TrainSampler

_PLANS_AHEAD = 8
_DEAD_WORKER = re.compile("DataLoader worker.*(exited unexpectedly|is killed)", re.DOTALL)


def build_loader(
    collator: Callable[[BatchPlan], HSTUBatch],
    sampler: Iterable[BatchPlan],
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[HSTUBatch]:
    """Yields one pass over ``sampler`` as batches. Close or drop the iterator to stop the workers. ``workers``:
    processes that build batches; 0 means this process. ``prefetch``: batches that each worker keeps ready.
    ``pin_memory``: return batches in pinned memory. One more process makes plans that are costly, so that they do not
    delay a step. Raises DataError where the data is damaged or a worker dies."""
    if isinstance(sampler, TrainSampler) and sampler.is_costly:
        sampler = _load(sampler, 1, _PLANS_AHEAD, "the process that plans batches died ({}). Most often memory ran out")
    if not workers:
        return (batch.pin_memory() if pin_memory else batch for batch in map(collator, sampler))
    died = (
        "a data worker died ({}). Most often memory ran out: lower TrainerArgs.data_workers "
        f"(now {workers}) or data_prefetch, or set data_workers = 0 to see the error itself"
    )
    return _load(_PlannedBatches(collator), workers, prefetch, died, sampler=sampler, pin_memory=pin_memory)


def _load(dataset: Dataset[Any], workers: int, prefetch: int, died: str, **options: Any) -> Iterator[Any]:
    """``died``: what to tell if a worker dies, with {} for the error."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=lambda item: item,
        num_workers=workers,
        prefetch_factor=prefetch,
        worker_init_fn=lambda _: end_with_parent(),
        # By default DataLoader seeds the workers from torch's global generator, so every evaluation and every resume
        # would change the dropout of later steps. The workers themselves draw nothing from torch.
        generator=torch.Generator(),
        **options,
    )
    return _batches(_start(loader), died)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Starts the workers in this thread; they end with it.

    torch's signal handler would raise a worker's death at any line of the main thread. Without the handler, waiting
    for the next batch raises it, at most 5 s later. gc.freeze excludes inherited objects from garbage collection in the
    workers: collecting an earlier run's process group would wait forever for threads that a forked worker lacks.

    A terminal, torchrun or a scheduler signals all processes of a run, but the training process still needs batches
    until the end of its step. Workers therefore inherit a mask that blocks these signals.
    """
    before = signal.getsignal(signal.SIGCHLD)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    gc.freeze()
    try:
        batches = iter(loader)
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    workers = getattr(batches, "_workers", ())
    for worker in workers:
        worker.terminate = worker.kill  # workers block SIGTERM
    # Without this, Python at exit would send SIGTERM, which the workers block, and wait for them.
    Finalize(batches, lambda: [worker.kill() for worker in workers], exitpriority=0)
    return batches


class _PlannedBatches(Dataset[Any]):
    """A dataset indexed by plans. It returns a UserError, because DataLoader would wrap a raised one in a traceback."""

    def __init__(self, collator: Callable[[BatchPlan], HSTUBatch]) -> None:
        self.collator = collator

    def __getitem__(self, plan: Any) -> HSTUBatch | UserError:
        try:
            return self.collator(plan)
        except UserError as error:
            return error


def _batches(batches: Iterator[Any], died: str) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, RuntimeError) as error:  # the first two: a worker died as it sent a batch
            if isinstance(error, RuntimeError) and not _DEAD_WORKER.match(str(error)):
                raise
            raise DataError(died.format(error)) from error
        if isinstance(batch, UserError):
            # Stops the workers now. Otherwise the garbage collector reaches them through the error's traceback, after
            # it has removed the queues that stop them, and torch 2.13 waits 5 s per worker.
            del batches
            raise batch
        yield batch
