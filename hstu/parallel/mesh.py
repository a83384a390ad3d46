"""Where this process stands: its device, its ranks and the process groups. The only place that decides them.

Works under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK, …) and with plain ``python`` as a world of one.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from hstu.config.errors import ConfigError
from hstu.parallel.progress import Progress

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 600.0
_HEAD_START_S = 10.0  # for the watchdog, which knows who is missing; NCCL's own would abort without saying so
_FINISH_TIMEOUT_S = 30.0
_DROPOUT_STREAM = 0x64726F70  # keeps the dropout seeds of rank 0 apart from the seed of the initial weights


@dataclass(frozen=True)
class Mesh:
    """Ranks, groups and device of this process. Data-parallel size = world size / tensor-parallel size."""

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
    world_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    seed: int
    store: dist.Store | None = None
    """What the launch shares beside collectives; None for a mesh that was never started."""
    progress: Progress = field(default_factory=Progress)
    """What this rank is at, for the watchdog."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and files."""
        return self.rank == 0


def start(
    tensor_parallel_size: int = 1,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    seed: int = 1234,
    deterministic: bool = False,
    allow_tf32: bool = False,
) -> Mesh:
    """Pick the device, join the process group, cut it into data- and tensor-parallel groups, seed this process.

    ``timeout_s``: a collective that waits longer fails, ten seconds later. ``deterministic``: only bitwise repeatable
    kernels, an error from torch where an operation has none. ``allow_tf32``: float32 products of matrices on a GPU may
    be computed in TF32. Afterwards torch's generator has the seed of the initial
    weights, the same on all ranks; call ``seed_dropout`` once the model is built.
    """
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _pick_device(local_rank)
    threads = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    timeout = timedelta(seconds=timeout_s + _HEAD_START_S)
    store = _join_world(device, timeout)
    mesh = _make_groups(device, local_rank, local_world_size, tensor_parallel_size, timeout, seed, store)
    seed_initial_weights(seed)
    log.info("rank %d of %d on %s, %d CPU threads", mesh.rank, mesh.world_size, device, threads)
    return mesh


def planned(
    world_size: int, local_world_size: int, tensor_parallel_size: int, device_type: str, seed: int = 1234
) -> Mesh:
    """Rank 0 of a mesh that was never started, to plan with: it has numbers, but no groups."""
    no_group = cast(dist.ProcessGroup, None)
    return Mesh(
        device=torch.device(device_type),
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=local_world_size,
        dp_rank=0,
        dp_size=world_size // tensor_parallel_size,
        tp_rank=0,
        tp_size=tensor_parallel_size,
        world_group=no_group,
        dp_group=no_group,
        tp_group=no_group,
        seed=seed,
    )


def finish(wait: bool = True) -> None:
    """Leave the process group, if one was joined, once all ranks are here.

    A rank that failed must not wait (``wait=False``; it does not either while an exception passes through): the
    others are in some other collective, and learn of the failure by its leaving.
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
    """Seed torch differently on each data-parallel rank (tensor-parallel ranks share a stream)."""
    words = np.random.SeedSequence([mesh.seed, _DROPOUT_STREAM, mesh.dp_rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. "
            "Start at most that many processes a host (torchrun --nproc-per-node)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join_world(device: torch.device, timeout: timedelta) -> dist.Store:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        served, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torch 2.13: torchrun --max-restarts serves the store of the first attempt to all. A rank that reads the old
        # address of one that is gone hangs (tests/distributed/test_failures.py tells when it is fixed).
        store: dist.Store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", served)
    else:  # plain python: a store in memory, so that no port can be taken
        store, rank, world_size = dist.HashStore(), 0, 1
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, timeout=timeout, store=groups, rank=rank, world_size=world_size)
    return store


def _make_groups(
    device: torch.device,
    local_rank: int,
    local_world_size: int,
    tp_size: int,
    timeout: timedelta,
    seed: int,
    store: dist.Store,
) -> Mesh:
    groups = _parallel_state()
    groups.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=False,
    )
    world_group = dist.group.WORLD
    assert world_group is not None
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_world_size=local_world_size,
        dp_rank=groups.get_data_parallel_rank(),
        dp_size=groups.get_data_parallel_world_size(),
        tp_rank=groups.get_tensor_model_parallel_rank(),
        tp_size=groups.get_tensor_model_parallel_world_size(),
        world_group=world_group,
        dp_group=groups.get_data_parallel_group(),
        tp_group=groups.get_tensor_model_parallel_group(),
        seed=seed,
        store=store,
    )


def _parallel_state():  # type: ignore[no-untyped-def]  # a module
    """Megatron's group registry; importing it warns about optional CUDA packages that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    return parallel_state
