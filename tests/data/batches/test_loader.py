import dataclasses
import gc
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hstu.base.errors import DataError
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.collate import Collator
from hstu.data.batches.loader import build_loader
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import START, BatchPartition, BatchPlan, Loads, SamplerPosition, TrainSampler
from tests.conftest import MakeStore
from tests.data.collators import assert_same, collator_of
from tests.serve.http_server import until

NUM_USERS = 23


OPTIONS: dict[str, Any] = {"length": 5, "batch_size": 3, "negatives": Negatives("uniform", 4), "wants_timestamps": True}


@pytest.fixture
def collator(make_store: MakeStore) -> Collator:
    rows = [[(user * 7 + n) % 40 for n in range(4 + user % 5)] for user in range(NUM_USERS)]
    return collator_of(make_store(rows, actions=rows, context={"age": list(range(NUM_USERS))}), **OPTIONS)


def plans(position: SamplerPosition = START) -> TrainSampler:
    return TrainSampler(NUM_USERS, 3, 0, 1, seed=4, shuffle=True, position=position)


def test_workers_change_neither_order_nor_content(collator: Collator) -> None:
    alone = list(islice(build_loader(collator, plans()), 12))
    ahead = list(islice(build_loader(pickle.loads(pickle.dumps(collator)), plans(), workers=2), 12))
    assert len(alone) == len(ahead) == 12
    for one, other in zip(alone, ahead, strict=True):
        assert_same(other, one)
        assert other.position == one.position
        assert torch.equal(other.user_ids, one.user_ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_plans_made_ahead_by_a_process_are_the_same_and_end_with_the_loader(
    collator: Collator, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = dataclasses.replace(
        plans(SamplerPosition(0, 7)), world_size=2, partition=BatchPartition(loads_of, balance=True, tokens_per_rank=9)
    )
    alone = list(islice(build_loader(collator, sampler), 12))
    monkeypatch.setattr("hstu.data.sampling.sampler._COSTLY_SAMPLES", 6)
    ahead = build_loader(collator, sampler, workers=workers)
    for one, other in zip(alone, islice(ahead, 12), strict=True):
        assert_same(other, one)
        assert other.position == one.position
    running = set(multiprocessing.active_children())
    del ahead
    gc.collect()
    until(lambda: len(running - set(multiprocessing.active_children())) == 1 + workers)


def loads_of(rows: np.ndarray) -> Loads:
    return Loads(1 + rows % 4, 1.0 + rows % 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_where_a_batch_says_the_run_stands(collator: Collator, workers: int) -> None:
    whole = list(islice(build_loader(collator, plans()), 12))
    assert whole[4].position is not None
    resumed = list(islice(build_loader(collator, plans(whole[4].position), workers=workers), 7))
    for one, other in zip(whole[5:], resumed, strict=True):
        assert_same(other, one)


def _dies(collator: Collator, plan: BatchPlan) -> HSTUBatch:
    """Kills its process at the third batch, as the kernel does where memory ran out."""
    if plan.global_start >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return collator(plan)


def test_a_dead_worker_is_a_clear_error(collator: Collator) -> None:
    with pytest.raises(DataError, match=r"a data worker died .*data_workers \(now 1\)"):
        list(islice(build_loader(partial(_dies, collator), plans(), workers=1), 12))
    gc.collect()  # as long as DataLoader's iterator is there, any child that ends makes it tell of the dead worker


def _collects(collator: Collator, plan: BatchPlan) -> HSTUBatch:
    """Builds a batch after a garbage collection."""
    gc.collect()
    return collator(plan)


def test_a_worker_leaves_the_garbage_of_the_training_process_alone(collator: Collator) -> None:
    """A process group that it collected would wait in it for threads that only the training process has."""
    gc.disable()
    try:
        store = dist.TCPStore("127.0.0.1", 0, 1, True)
        garbage: list[object] = [dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=60))]
        garbage.append(garbage)
        del garbage, store
        batches = build_loader(partial(_collects, collator), plans(), workers=1)
        assert len(list(islice(batches, 2))) == 2
    finally:
        gc.enable()


def _breaks(plan: BatchPlan) -> HSTUBatch:
    raise ZeroDivisionError("a defect")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_of_ours_keeps_its_traceback(workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect") as error:
        next(build_loader(_breaks, plans(), workers=workers))
    traceback.clear_frames(error.tb)  # which hold the loader: left to the garbage collector it takes 5 s to stop


def test_no_signal_reaches_a_worker_at_any_time(collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before a worker runs a line of ours."""
    masks = []
    fork = os.fork

    def fork_and_note() -> int:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return fork()

    monkeypatch.setattr(os, "fork", fork_and_note)
    batches = build_loader(collator, plans(), workers=2)
    next(batches)
    assert len(masks) == 2 and all({signal.SIGINT, signal.SIGTERM} <= mask for mask in masks)
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_dropping_the_loader_stops_its_workers(collator: Collator) -> None:
    batches = build_loader(collator, plans(), workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert multiprocessing.active_children() == []


_held: list[Iterator[HSTUBatch]] = []


def _end_with_a_loader(collator: Collator) -> None:
    _held.append(build_loader(collator, plans(), workers=2))
    next(_held[0])


def test_a_process_that_ends_with_a_loader_does_not_wait_for_its_workers(collator: Collator) -> None:
    process = multiprocessing.get_context("fork").Process(target=_end_with_a_loader, args=(collator,))
    process.start()
    process.join(30)
    ended = process.exitcode
    process.kill()
    assert ended == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_generator_of_dropout(collator: Collator, workers: int) -> None:
    before = torch.get_rng_state()
    next(build_loader(collator, plans(), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
