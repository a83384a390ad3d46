"""Batches in exact order, built in this process or ahead of time in worker processes.

Workers receive plans and return batches in the order of the plans, so the order and content of a run are the same for
any number of workers.

A batch travels from a worker as one block of bytes, through memory that is reused. torch would send each of the
dozen tensors of a batch through its own shared file, mapping and connection; a pipe holds only kilobytes, so sender
and receiver would wait for each other. Here all tensors are copied into one block and become slices of it again on
arrival, so pinning the block pins them all. The block lies in an anonymous memory file, which the receiver opens
through /proc. Its pages are kept, because allocating fresh ones costs more than the copy.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hstu.base.errors import DataError, UserError
from hstu.base.processes import end_with_parent
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import BatchPlan

_ALIGNMENT = 64
_DEAD_WORKER = re.compile("DataLoader worker.*(exited unexpectedly|is killed)", re.DOTALL)
"""What DataLoader's RuntimeError says, raised from a poll or from its SIGCHLD handler, where a worker has died."""


def build_loader(
    collator: Callable[[BatchPlan], HSTUBatch],
    sampler: Iterable[BatchPlan],
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[HSTUBatch]:
    """One pass over ``sampler``, as batches. Close or drop the iterator to stop the workers.

    Args:
        workers: processes that build batches; 0 means this one.
        prefetch: batches that each worker keeps ready.
        pin_memory: return batches in pinned memory.
        start_method: how workers start; None for the platform's default.

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
        worker_init_fn=_follow_the_parent,
        multiprocessing_context=start_method if workers else None,
        # By default DataLoader seeds the workers from torch's global generator, so every evaluation and every resume
        # would change the dropout of the following steps. No worker draws from torch.
        generator=torch.Generator(),
    )
    batches = _start(loader)
    # With pinning, DataLoader runs such a thread itself.
    return _batches(_read_ahead(batches) if workers and not pin_memory else batches, workers)


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


def _read_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a thread fetches the next one, milliseconds for megabytes, while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="next_batch") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


class _PlannedBatches(Dataset[Any]):
    """A dataset indexed by plans. It returns a UserError, because DataLoader would wrap a raised one in a traceback.

    ``outbox``: sends the batches of a worker process; None in the training process. Its slots suffice, because
    DataLoader requests at most ``prefetch`` batches per worker that it has not received.
    """

    def __init__(self, collator: Callable[[BatchPlan], HSTUBatch], outbox: Outbox | None) -> None:
        self.collator = collator
        self.outbox = outbox

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
        yield unpack(batch) if isinstance(batch, Packed) else batch


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


@dataclass(frozen=True)
class Packed:
    """Any object: its pickle, in which tensors are slices of ``content``, the bytes of all tensors."""

    pickled: bytes
    content: bytearray | Tensor

    @property
    def tensor(self) -> Tensor:
        """The content as uint8 [bytes], without a copy."""
        if isinstance(self.content, Tensor):
            return self.content
        return torch.frombuffer(self.content, dtype=torch.uint8) if self.content else torch.empty(0, dtype=torch.uint8)

    def pin_memory(self) -> Packed:
        """A copy in pinned host memory; DataLoader calls this."""
        return Packed(self.pickled, self.tensor.pin_memory())


class Outbox:
    """Reused memory of a worker, through which packed objects reach the process that unpickles what ``put`` returns.

    ``slots``: objects that may wait at once; the next one overwrites the oldest.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._files: list[int] = []  # created by the worker itself, not by the process it was forked from
        self._count = 0

    def put(self, packed: Packed) -> Sent:
        """A reference to be unpickled once, by a process of the same user while this one lives; becomes ``packed``."""
        if isinstance(packed.content, Tensor):
            raise TypeError("a pinned batch cannot be sent; pin it after it arrives")
        if len(self._files) < self._slots:
            self._files.append(os.memfd_create("batch"))
        file = self._files[self._count % self._slots]
        self._count += 1
        size = os.pwrite(file, packed.content, 0)
        if size != len(packed.content):
            raise OSError(f"only {size} of {len(packed.content)} bytes of a batch fitted into memory")
        return Sent(packed.pickled, os.getpid(), file, size)


@dataclass(frozen=True)
class Sent:
    """A reference to a packed object in an Outbox, which unpickles to it. ConnectionError if the sender is gone."""

    pickled: bytes
    process: int
    file: int
    size: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _fetch, (self.pickled, self.process, self.file, self.size)


def _fetch(pickled: bytes, process: int, file: int, size: int) -> Packed:
    content = bytearray(size)
    try:
        own = os.open(f"/proc/{process}/fd/{file}", os.O_RDONLY)
    except OSError as error:
        raise ConnectionError(f"process {process} is gone, and with it a batch that it had built") from error
    try:
        os.preadv(own, [content], 0)
    finally:
        os.close(own)
    return Packed(pickled, content)


def pack(thing: Any) -> Packed:
    """An object whose tensors, all on the CPU, are copied into one block."""
    sink = io.BytesIO()
    packer = _Packer(sink)
    packer.dump(thing)
    packed = Packed(sink.getvalue(), bytearray(packer.size))
    content = packed.tensor
    for start, tensor in packer.tensors:
        _slice(content, start, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
    return packed


def unpack(packed: Packed) -> Any:
    """The object that was packed; its tensors share the memory of ``packed``."""
    return _Unpacker(packed).load()


class _Packer(pickle.Pickler):
    def __init__(self, sink: io.BytesIO) -> None:
        super().__init__(sink, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Tensor]] = []
        self.size = 0

    def persistent_id(self, thing: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(thing, Tensor):
            return None
        start, num_bytes = self.size, thing.numel() * thing.element_size()
        self.tensors.append((start, thing))
        self.size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return start, thing.dtype, tuple(thing.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.pickled))
        self._content = packed.tensor

    def persistent_load(self, reference: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        return _slice(self._content, *reference)


def _slice(content: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return content[start : start + size].view(dtype).view(shape)
