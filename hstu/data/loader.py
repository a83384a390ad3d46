"""Batches in exact order, made in this process or ahead of time in workers.

Plans are what travels to the workers: a worker turns the plan that it is sent into a batch, and the batches come
back in the order of the plans. The order and content of a run are therefore the same for any number of workers.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hstu.config.errors import DataError, UserError
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import BatchPlan
from hstu.data.transport import Packed, pack, unpack


def build_loader(
    collator: Callable[[BatchPlan], HSTUBatch],
    sampler: Iterable[BatchPlan],
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[HSTUBatch]:
    """One pass over ``sampler``, as batches.

    ``workers``: processes that make batches; 0: this one does. ``prefetch``: batches that each worker keeps ready.
    ``start_method`` of the workers: None for the platform's. Close the iterator, or drop it, to stop the workers.
    Raises DataError where the data is damaged or a worker dies.
    """
    loader: DataLoader[Any] = DataLoader(
        _PlannedBatches(collator, sent=deque(maxlen=prefetch + 1) if workers else None),
        batch_size=None,
        sampler=sampler,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_parent,
        multiprocessing_context=start_method if workers else None,
        # Else the workers' seed is drawn from torch's generator: each evaluation, and each resume, would then change
        # the dropout of the steps that follow. No worker draws anything from torch.
        generator=torch.Generator(),
    )
    return _batches(iter(loader), workers)  # iter starts the workers


class _PlannedBatches(Dataset[Any]):
    """A dataset indexed by plans. A user's error is returned, not raised: DataLoader would bury it in a traceback."""

    def __init__(self, collator: Callable[[BatchPlan], HSTUBatch], sent: deque[Packed] | None) -> None:
        self.collator = collator
        self.sent = sent
        """Of a worker: what may not have been received yet. DataLoader asks for no more than ``prefetch`` at a time."""

    def __getitem__(self, plan: Any) -> HSTUBatch | Packed | UserError:
        try:
            batch = self.collator(plan)
        except UserError as error:
            return error
        if self.sent is None:
            return batch
        self.sent.append(pack(batch))
        return self.sent[-1]


def _batches(batches: Iterator[Any], workers: int) -> Iterator[HSTUBatch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:  # it died while it handed a batch over
            raise _dead_worker(error, workers) from error
        except RuntimeError as error:
            if _is_dead_worker(error):
                raise _dead_worker(error, workers) from error
            raise
        if isinstance(batch, UserError):
            raise batch
        yield unpack(batch) if isinstance(batch, Packed) else batch


def _is_dead_worker(error: RuntimeError) -> bool:
    # DataLoader tells this by its messages alone, from a poll or from its SIGCHLD handler.
    message = str(error)
    return message.startswith("DataLoader worker") and ("exited unexpectedly" in message or "is killed" in message)


def _dead_worker(error: Exception, workers: int) -> DataError:
    return DataError(
        f"a data worker died ({error}). Most often memory ran out: lower TrainerArgs.data_workers (now {workers}) or "
        "data_prefetch, or set data_workers = 0 to see the error itself"
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches the whole process group; workers stop when the parent does, without tracebacks of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
