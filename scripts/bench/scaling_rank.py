"""One rank of scaling_cpu.py: builds what it is told to, and trains some steps of it whenever it is asked."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from collective_clock import CollectiveClock, Times


@dataclass(frozen=True)
class Variant:
    """A way to train: a gin file with bindings."""

    gin_file: str
    task: str
    bindings: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """The processes that train together, one a core. ``rank`` stands on core ``cores[rank]``."""

    cores: tuple[int, ...]
    tp_size: int
    variants: dict[str, Variant]


@dataclass
class Measured:
    """Some steps of one rank. begun, ended: seconds on CLOCK_MONOTONIC; data_s: getting batches, less ``times``."""

    begun: float
    ended: float
    data_s: float
    sequences: int
    tokens: int
    times: Times = field(default_factory=Times)


def serve(pipe: Connection, world: World, rank: int, port: int) -> None:
    """Answer each (variant, steps) that comes through ``pipe`` with Measured, until None comes."""
    os.environ.update(_launcher_environment(world, rank, port))
    # After the environment is set, and in a process whose affinity is one core: so many threads do libraries start.
    import torch

    from hstu.config.gin_io import load
    from hstu.data.batch import HSTUBatch
    from hstu.data.sampler import SamplerPosition
    from hstu.observe.logging import quiet_libraries
    from hstu.parallel import mesh as meshes
    from hstu.parallel.dense import ReplicatedDense
    from hstu.train.builder import build_model, build_pipeline
    from hstu.train.sources import open_source
    from hstu.train.work import StepWork

    class Timed:
        """Batches, and the time to get them."""

        def __init__(self, batches: Iterator[HSTUBatch], clock: CollectiveClock) -> None:
            self.batches, self.clock, self.seconds = batches, clock, 0.0

        def __iter__(self) -> Iterator[HSTUBatch]:
            return self

        def __next__(self) -> HSTUBatch:
            begun, blocked = time.monotonic(), self.clock.times.blocked_s
            batch = next(self.batches)
            self.seconds += time.monotonic() - begun - (self.clock.times.blocked_s - blocked)
            return batch

    quiet_libraries()
    clock = CollectiveClock()
    mesh = meshes.start(tensor_parallel_size=world.tp_size)
    torch.set_num_threads(1)
    made = {}
    for name, variant in world.variants.items():
        config = load([variant.gin_file], list(variant.bindings), variant.task)  # type: ignore[arg-type]
        source = open_source(config, mesh)
        meshes.seed_initial_weights(config.trainer.seed)
        model, optimizers = build_model(config, source, mesh)
        if isinstance(model.dense, ReplicatedDense):
            clock.watch(model.dense)
        batches = Timed(source.train_batches(SamplerPosition()), clock)
        work = StepWork(config.network, source.roles)
        made[name] = build_pipeline(config.trainer, model, optimizers, mesh), batches, work
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        name, steps = asked
        pipeline, batches, work = made[name]
        torch.distributed.barrier()
        clock.restart()
        batches.seconds = 0.0
        measured = Measured(time.monotonic(), 0.0, 0.0, 0, 0)
        for _ in range(steps):
            batch = pipeline.progress(batches).batch
            measured.sequences += batch.real_batch_size
            measured.tokens += work.of(batch)[0]
        measured.ended, measured.data_s, measured.times = time.monotonic(), batches.seconds, clock.restart()
        pipe.send(measured)
    meshes.finish()


def _launcher_environment(world: World, rank: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    ranks: Sequence[int] = world.cores
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": len(ranks)}
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return {name: str(value) for name, value in names.items()} | fixed
