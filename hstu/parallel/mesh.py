"""The device, ranks and process groups of this process, which no other file decides, and its heartbeat.

Works under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK, …) and with plain ``python`` as a world of one.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType

import numpy as np
import torch
import torch.distributed as dist

from hstu.base.errors import ConfigError
from hstu.parallel.collectives import require_equal
from hstu.parallel.machine_checks import (
    make_cublas_deterministic,
    require_networks,
    require_table_kernels,
    require_usable_gpus,
)

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 600.0
_HEAD_START_S = 10.0  # for our watchdog, which names the missing rank, before NCCL's watchdog aborts the process
_NO_TIMEOUT = timedelta(days=365)
_FINISH_TIMEOUT_S = 30.0
_DROPOUT_STREAM = 0x64726F70  # makes the dropout seed of rank 0 differ from the seed of the initial weights


class Heartbeat:
    """What the main thread is doing. A mark costs two assignments, and any thread may read at any time.

    All ranks run the same program, so all make the same marks. The rank that has made the fewest marks is behind.
    """

    def __init__(self) -> None:
        self.iteration = 0
        """The training step in progress, counted from 1; 0 before the first."""
        self.stage = "starting"
        self.marks = 0
        self._at = time.monotonic()

    def mark(self, stage: str | None = None, iteration: int | None = None) -> None:
        """Count a step forward that all ranks take, into another ``stage`` or ``iteration`` if given."""
        self.stage = self.stage if stage is None else stage
        self.iteration = self.iteration if iteration is None else iteration
        self.marks += 1
        self.beat()

    def beat(self) -> None:
        """Note that this rank makes progress, in work of which some ranks have more than others."""
        self._at = time.monotonic()

    def excuse(self, seconds: float) -> None:
        """Do not count these seconds as idle."""
        self._at = min(self._at + seconds, time.monotonic())

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Mark ``stage``, and the previous stage afterwards; after an error the stage stays where the error arose."""
        before = self.stage
        self.mark(stage)
        yield
        self.mark(before)

    @property
    def idle_s(self) -> float:
        """Seconds since the last mark or beat."""
        return time.monotonic() - self._at


@dataclass(frozen=True)
class Mesh:
    """Ranks, groups and device of this process, in Megatron's terms and order: tp varies fastest, then cp, then dp.

    A tp_cp group computes on the sequences of all its ranks; there are dp_size such groups.
    """

    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this host."""
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    world_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    tp_cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    """Ranks with equal dense weights."""
    shard_group: dist.ProcessGroup
    """Those of them that share sharded dense weights or optimizer states: all, or neighbours in ``dp_cp_group``."""
    replica_group: dist.ProcessGroup | None
    """Those of them that hold the same shards as this rank; None if ``shard_group`` is all of ``dp_cp_group``."""
    seed: int
    store: dist.Store | None = None
    """The key-value store of the launch; None for a mesh that was never started."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """What this rank is doing, for the watchdog."""

    @property
    def tp_cp_size(self) -> int:
        """Ranks that compute on the same sequences."""
        return self.tp_size * self.cp_size

    @property
    def tp_cp_rank(self) -> int:
        """Index of this rank in ``tp_cp_group``."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def dp_cp_size(self) -> int:
        """Ranks with equal dense weights."""
        return self.dp_size * self.cp_size

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and files."""
        return self.rank == 0


def start(
    tensor_parallel_size: int = 1,
    context_parallel_size: int = 1,
    shard_group_size: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    seed: int = 1234,
    deterministic: bool = False,
    allow_tf32: bool = False,
    must_agree: Mapping[str, str] = MappingProxyType({}),
) -> Mesh:
    """Choose the device, join the world, create data-, tensor- and context-parallel groups, and seed this process.

    Afterwards torch's generator has the seed of the initial weights, which is equal on all ranks. Call ``seed_dropout``
    once the model is built.

    Args:
        shard_group_size: ranks of a ``Mesh.shard_group``, a divisor of the number of those with equal dense weights.
            None: all of them.
        timeout_s: a collective that waits for longer fails, ten seconds later. See ``without_timeout``.
        deterministic: use only bitwise repeatable kernels; torch raises where an operation has none.
        allow_tf32: allow TF32 in float32 matrix products on a GPU.
        must_agree: name → value of what must be equal on all ranks.

    Raises ConfigError where this host has fewer GPUs than processes, GPUs that torch cannot use, or not the network
    interfaces that the environment names; and on all ranks where ``must_agree`` differs.
    """
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if deterministic:
        make_cublas_deterministic()
    device = _pick_device(local_rank)
    require_networks(device.type)
    threads = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    timeout = timedelta(seconds=timeout_s + _HEAD_START_S)
    store = _join_world(device, timeout)
    world_group = dist.group.WORLD
    assert world_group is not None
    require_equal(must_agree, world_group, ConfigError)  # ranks of other groups would wait for each other below
    groups = _parallel_state()
    groups.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        context_parallel_size=context_parallel_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=False,
    )
    dp_cp_group = groups.get_data_parallel_group(with_context_parallel=True)
    shard_group, replica_group = _split(dp_cp_group, tensor_parallel_size, shard_group_size, timeout)
    mesh = Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_world_size=local_world_size,
        dp_rank=groups.get_data_parallel_rank(),
        dp_size=groups.get_data_parallel_world_size(),
        tp_rank=groups.get_tensor_model_parallel_rank(),
        tp_size=groups.get_tensor_model_parallel_world_size(),
        cp_rank=groups.get_context_parallel_rank(),
        cp_size=groups.get_context_parallel_world_size(),
        world_group=world_group,
        dp_group=groups.get_data_parallel_group(),
        tp_group=groups.get_tensor_model_parallel_group(),
        cp_group=groups.get_context_parallel_group(),
        tp_cp_group=groups.get_tensor_and_context_parallel_group(),
        dp_cp_group=dp_cp_group,
        shard_group=shard_group,
        replica_group=replica_group,
        seed=seed,
        store=store,
    )
    seed_initial_weights(seed)
    log.info("rank %d of %d on %s, %d CPU threads", mesh.rank, mesh.world_size, device, threads)
    return mesh


def without_timeout(mesh: Mesh) -> None:
    """Let collectives wait for as long as it takes: for a run whose watchdog ends ranks that are stuck.

    Their own timeout counts the time in which all ranks are suspended.
    """
    groups = [mesh.dp_group, mesh.tp_group, mesh.cp_group, mesh.tp_cp_group, mesh.dp_cp_group]
    if mesh.replica_group is not None:
        groups += [mesh.shard_group, mesh.replica_group]
    for group in (mesh.world_group, *groups):
        dist.distributed_c10d._set_pg_timeout(_NO_TIMEOUT, group)


def finish(wait: bool = True) -> None:
    """Leave the process group, if one was joined, after waiting for all ranks.

    A rank that failed must not wait: the others are in some other collective, which fails when this rank leaves. It
    passes ``wait=False``; while an exception propagates, this function does not wait anyway.
    """
    if not dist.is_initialized():
        return
    if wait and sys.exception() is None:
        _wait_for_all_ranks()
    _parallel_state().destroy_model_parallel()
    dist.destroy_process_group()


def _wait_for_all_ranks() -> None:
    try:
        last = dist.all_reduce(torch.zeros(1), async_op=True)
        last.wait(timedelta(seconds=_FINISH_TIMEOUT_S))
    except RuntimeError as error:
        log.warning("not all ranks have finished: %s", error)


def seed_initial_weights(seed: int) -> None:
    """Seed Python, numpy and torch with the same value on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_dropout(mesh: Mesh) -> None:
    """Seed torch differently on each data-parallel rank; the ranks of a tp_cp group share a seed."""
    words = np.random.SeedSequence([mesh.seed, _DROPOUT_STREAM, mesh.dp_rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def _pick_device(local_rank: int) -> torch.device:
    require_usable_gpus()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. "
            "Start at most that many processes per host (torchrun --nproc-per-node)."
        )
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    require_table_kernels(device)
    return device


def _join_world(device: torch.device, timeout: timedelta) -> dist.Store:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            served, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        except dist.DistError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"rank {os.environ['RANK']} cannot join the others at {place} (MASTER_ADDR, MASTER_PORT): {error}. "
                "Check that the port is free on the host of rank 0 and that other hosts reach it, or choose another "
                "port: torchrun --master_port, or --standalone on a single host."
            ) from error
        # torch 2.13: with --max-restarts torchrun serves one store to all attempts, and a rank that reads the address
        # of a rank of an earlier attempt hangs. tests/distributed/test_failures.py fails when this is fixed.
        store: dist.Store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", served)
    else:  # plain python: a store in memory needs no port
        store, rank, world_size = dist.HashStore(), 0, 1
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, timeout=timeout, store=groups, rank=rank, world_size=world_size)
    return store


def _split(
    dp_cp_group: dist.ProcessGroup, tp_size: int, shard_group_size: int | None, timeout: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """``shard_group`` and ``replica_group`` of a Mesh. Collective over the world.

    Megatron-core 0.16.1 makes such groups for the replicas of its distributed optimizer, but needs einops for them.
    """
    if shard_group_size is None or shard_group_size == dist.get_world_size(dp_cp_group):
        return dp_cp_group, None
    ranks = np.arange(dist.get_world_size()).reshape(-1, shard_group_size, tp_size)  # [replica, shard, tensor]
    shards = ranks.transpose(0, 2, 1).reshape(-1, ranks.shape[1]).tolist()
    replicas = ranks.transpose(1, 2, 0).reshape(-1, ranks.shape[0]).tolist()
    shard_group, replica_group = (
        dist.new_subgroups_by_enumeration(subgroups, timeout=timeout)[0] for subgroups in (shards, replicas)
    )
    return shard_group, replica_group


def _parallel_state():  # type: ignore[no-untyped-def]  # a module
    """Megatron's group registry; importing it warns about optional CUDA packages that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    return parallel_state
