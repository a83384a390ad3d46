"""Device, ranks, process groups and heartbeat of this process, under torchrun or as a world of one in plain Python."""

import ctypes
import logging
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from hstu.base import remote
from hstu.base.errors import ConfigError
from hstu.parallel.collectives import require_equal

log = logging.getLogger(__name__)

_HEAD_START_S = 10.0  # lets our watchdog name the missing rank before NCCL's watchdog aborts the process
_NO_TIMEOUT = timedelta(days=365)
_FINISH_TIMEOUT_S = 30.0
_NO_GPU = 100, 34
"""Results of cuInit (cuda.h) on a machine without a GPU: no device, stub library. Other errors: an unusable GPU."""
_FILES_OF_A_RANK = 200
"""Open files of a rank beside its connections; measured: 40 to 90."""
_DROPOUT_STREAM = 0x64726F70  # makes the dropout seed of rank 0 differ from the seed of the initial weights


@dataclass(eq=False)
class Heartbeat:
    """Progress of the main thread, readable from any thread. All ranks set the same marks: fewer marks mean behind."""

    iteration: int = 0
    """The current training step, counted from 1; 0 before the first."""
    stage: str = "starting"
    marks: int = 0
    _at: float = field(default_factory=time.monotonic)

    def mark(self, stage: str | None = None, iteration: int | None = None) -> None:
        """Count progress that all ranks make, and set ``stage`` and ``iteration`` if given."""
        self.stage = stage or self.stage
        self.iteration = iteration or self.iteration
        self.marks += 1
        self.beat()

    def beat(self) -> None:
        """Record progress of this rank only, in work that is uneven between ranks."""
        self._at = time.monotonic()

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Mark ``stage``, then the previous stage again. After an error the stage stays, so that reports name it."""
        before = self.stage
        self.mark(stage)
        yield
        self.mark(before)

    @property
    def idle_s(self) -> float:
        """Seconds since the last mark or beat, or since files of a URL were copied."""
        return time.monotonic() - max(self._at, remote.progress["at"])


@dataclass(frozen=True)
class Mesh:
    """Device, ranks and groups of this process, in Megatron's terms. tp varies fastest, then cp, then dp.

    The ranks of a tp_cp group compute on the same sequences; there are dp_size such groups.
    """

    device: torch.device
    rank: int
    world_size: int
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
    seed: int
    store: dist.Store | None = None
    """Key-value store of the launch; None for a mesh made without ``start``."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Progress of this rank, read by the watchdog."""

    @classmethod
    def of(cls, tp_size: int, cp_size: int, group_of: Callable[[str, range], dist.ProcessGroup], **others: Any) -> Self:
        """Place this rank of the world. ``group_of`` (field, ranks) returns its group of a kind; ``others``: fields."""
        rank, world_size, size = dist.get_rank(), dist.get_world_size(), tp_size * cp_size
        tp_rank, place = rank % tp_size, rank % size
        first = rank - place
        ranks = {
            "dp_group": range(place, world_size, size),
            "tp_group": range(rank - tp_rank, rank - tp_rank + tp_size),
            "cp_group": range(first + tp_rank, first + size, tp_size),
            "tp_cp_group": range(first, first + size),
            "dp_cp_group": range(tp_rank, world_size, tp_size),
        }
        groups: dict[str, Any] = {name: group_of(name, members) for name, members in ranks.items()}
        return cls(
            rank=rank,
            world_size=world_size,
            dp_rank=rank // size,
            dp_size=world_size // size,
            tp_rank=tp_rank,
            tp_size=tp_size,
            cp_rank=place // tp_size,
            cp_size=cp_size,
            **others,
            **groups,
        )

    @property
    def tp_cp_size(self) -> int:
        """Number of ranks that compute on the same sequences."""
        return self.tp_size * self.cp_size

    @property
    def tp_cp_rank(self) -> int:
        """Index of this rank in ``tp_cp_group``."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def dp_cp_size(self) -> int:
        """Number of ranks with equal dense weights."""
        return self.dp_size * self.cp_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0


def start(
    tensor_parallel_size: int = 1,
    context_parallel_size: int = 1,
    timeout_s: float = 600.0,
    seed: int = 1234,
    deterministic: bool = False,
    allow_tf32: bool = False,
    must_agree: Mapping[str, str] = MappingProxyType({}),
) -> Mesh:
    """Choose the device, join the world, create process groups and seed for the initial weights (see ``seed_dropout``).

    Args:
        timeout_s: collectives that wait longer fail ten seconds later. See ``without_timeout``.
        deterministic: use only bitwise repeatable kernels; torch raises where an operation has none.
        must_agree: name → value that must be equal on all ranks.

    Raises ConfigError if this host lacks GPUs, torch cannot use them, or ``must_agree`` differs (on all ranks).
    """
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    device = _pick_device(local_rank)
    if local_world_size > 1:  # torchrun gives each rank one thread; alone, the caller's number stays
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    timeout = timedelta(seconds=timeout_s + _HEAD_START_S)
    store = _join_world(device, timeout)
    world_group = dist.group.WORLD
    assert world_group is not None
    require_equal(must_agree, world_group, ConfigError)  # first: ranks with different group sizes would hang below
    if dist.get_world_size() % (tensor_parallel_size * context_parallel_size):
        sizes = f"{tensor_parallel_size} (tensor parallel) x {context_parallel_size} (context parallel)"
        raise ConfigError(f"the {dist.get_world_size()} ranks cannot be divided into groups of {sizes}")
    existing: dict[range, dist.ProcessGroup] = {range(dist.get_world_size()): world_group}

    def group_of(name: str, ranks: range) -> dist.ProcessGroup:
        if ranks not in existing:
            # Each rank creates its own groups only, in the order of names that is equal on all ranks.
            existing[ranks] = dist.new_group(
                list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=name
            )
        return existing[ranks]

    mesh = Mesh.of(
        tensor_parallel_size,
        context_parallel_size,
        group_of,
        device=device,
        local_world_size=local_world_size,
        world_group=world_group,
        seed=seed,
        store=store,
    )
    seed_initial_weights(seed)
    log.info("rank %d of %d on %s, %d CPU threads", mesh.rank, mesh.world_size, device, torch.get_num_threads())
    return mesh


def without_timeout(mesh: Mesh) -> None:
    """Let collectives wait without limit, for runs in which a watchdog ends stuck ranks."""
    for group in vars(mesh).values():
        if isinstance(group, dist.ProcessGroup):
            dist.distributed_c10d._set_pg_timeout(_NO_TIMEOUT, group)


def finish(wait: bool = True) -> None:
    """Wait for all ranks and leave the process group, if this process has joined one.

    A failed rank (``wait=False``, or during an exception) leaves at once: the collectives of the other ranks then fail.
    """
    if not dist.is_initialized():
        return
    if wait and sys.exception() is None:
        try:
            dist.all_reduce(torch.zeros(1), async_op=True).wait(timedelta(seconds=_FINISH_TIMEOUT_S))
        except RuntimeError as error:
            log.warning("not all ranks have finished: %s", error)
    dist.destroy_process_group()


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
    if not torch.cuda.is_available():
        if _has_gpus():  # without this error the run would silently train on the CPU
            build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
            raise ConfigError(
                f"this machine has NVIDIA GPUs, but torch cannot use them: torch {torch.__version__} {build}. "
                "Check that nvidia-smi works and shows at least that CUDA version, or install the CUDA build "
                "(rm -rf .venv && scripts/install.sh). To compute on the CPU all the same, put "
                'CUDA_VISIBLE_DEVICES="" before the command.'
            )
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. "
            "Start at most that many processes per host (torchrun --nproc-per-node)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _has_gpus() -> bool:
    """Whether the NVIDIA driver, queried without torch, has GPUs that are visible to this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count, error = ctypes.c_int(), driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value > 0 if error == 0 else error not in _NO_GPU


def _join_world(device: torch.device, timeout: timedelta) -> dist.Store:
    if dist.is_initialized():  # a notebook trains one model after another, in one world
        return dist.distributed_c10d._get_default_store()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connect two ranks at their first message, not all at the start
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the old name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder keeps so many collectives
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _allow_open_files(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        try:
            served, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        except dist.DistError as error:
            place, why = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", str(error).rstrip(".")
            raise ConfigError(
                f"rank {os.environ['RANK']} cannot join the others at {place} (MASTER_ADDR, MASTER_PORT): {why}. "
                "Check that other hosts reach the port, or choose another one (torchrun --master_port)."
            ) from error
        # torch 2.13: with --max-restarts torchrun shares one store between all attempts, and a rank that reads an
        # address from an earlier attempt hangs. tests/distributed/test_failures.py fails when this is fixed.
        # Where the store is new in each attempt, agents that were started anew count attempts from 0 again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _torchrun_serves_the_store() else "0"
        store: dist.Store = dist.PrefixStore(f"attempt {attempt}", served)
    else:  # plain python: an in-memory store needs no port
        store, rank, world_size = dist.HashStore(), 0, 1
    groups = dist.PrefixStore("groups", store)
    bound = device if device.type == "cuda" else None  # NCCL connects now, and splits new groups off this one
    dist.init_process_group(backend, timeout=timeout, store=groups, rank=rank, world_size=world_size, device_id=bound)
    return store


def _torchrun_serves_the_store() -> bool:
    """Whether torchrun's agent, which outlives the ranks, serves their store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _allow_open_files(rank: int, world_size: int) -> None:
    """Raise this process's limit of open files if the ranks need it. Raises ConfigError if the host allows too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    of_store = 0 if rank else 2 * world_size  # each rank connects twice to the process that serves the store
    by_torchrun = _torchrun_serves_the_store()
    # A rank may connect to every other. Rank 0 does so twice, because it also collects the plans of background saves.
    needed = _FILES_OF_A_RANK + world_size * (1 if rank else 2) + (0 if by_torchrun else of_store)
    least = max(needed, _FILES_OF_A_RANK + of_store)
    if hard < needed or (by_torchrun and soft < _FILES_OF_A_RANK + of_store):  # torchrun keeps its soft limit
        raise ConfigError(
            f"rank {rank} of {world_size} or its launcher needs {least:,} open files, but the limits here are {soft:,} "
            f"(soft) and {hard:,} (hard). Run ulimit -n {least} before the launcher, on every host; if that is "
            "refused, raise the hard limit (limits.conf, or --ulimit nofile of docker)."
        )
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
