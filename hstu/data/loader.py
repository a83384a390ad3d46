"""Batches in exact order, made in this process or ahead of time in workers.

Plans are what travels to the workers: a worker turns the plan that it is sent into a batch, and the batches come
back in the order of the plans. The order and content of a run are therefore the same for any number of workers.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hstu.config.errors import DataError, UserError
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import BatchPlan
from hstu.data.transport import Outbox, Packed, Sent, pack, unpack


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
        _PlannedBatches(collator, outbox=Outbox(prefetch + 1) if workers else None),
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
    batches = iter(loader)  # starts the workers
    # Where batches are pinned DataLoader has such a thread already.
    return _batches(_read_ahead(batches) if workers and not pin_memory else batches, workers)


def _read_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same; a thread takes the next one from its worker, milliseconds for megabytes, while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="next_batch") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


class _PlannedBatches(Dataset[Any]):
    """A dataset indexed by plans. A user's error is returned, not raised: DataLoader would bury it in a traceback."""

    def __init__(self, collator: Callable[[BatchPlan], HSTUBatch], outbox: Outbox | None) -> None:
        self.collator = collator
        self.outbox = outbox
        """Of a worker. DataLoader asks one for no more than ``prefetch`` batches that it has not received."""

    def __getitem__(self, plan: Any) -> HSTUBatch | Sent | UserError:
        try:
            batch = self.collator(plan)
        except UserError as error:
            return error
        return batch if self.outbox is None else self.outbox.put(pack(batch))


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
            # Stops the workers. The garbage collector, which would come upon them by way of the error's traceback,
            # first takes away what they are told to stop by: torch 2.13 then waits 5 s for each.
            del batches
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
