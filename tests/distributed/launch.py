"""Run a function on several real processes that can form a process group, as torchrun would start them.

    results = run_ranks(2, add_ranks, first=7)                             # one function
    results = run_cases(2, {"sgd": partial(train, optimizer="sgd"), ...})  # many cases in one launch

The function and its arguments are pickled, so it is a function of a module. It runs on each rank with torchrun's
environment, and starts the process group itself (``hstu.parallel.mesh.start``); ``run_cases`` does that for its cases.
Results come back pickled, in rank order.

``run_script`` runs a script of the repository so. What starts one for users, python and torchrun, is tested by
test_entry_scripts.py.

The ranks are forked from a server that has imported torch, TorchRec and Megatron once, which otherwise takes each
process seconds. Each rank is a process and a session of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from hstu.parallel.mesh import Mesh, finish, start

P = ParamSpec("P")
R = TypeVar("R")
REPOSITORY = Path(__file__).resolve().parents[2]
STDERR_TAIL_CHARACTERS = 6000
FIRST_PORT, LAST_PORT = 20000, 32000
"""Below those that Linux gives to connections (32768 and up): a port found here is still free when it is used later."""
STACKS = signal.SIGUSR1
"""A rank that gets this signal writes the stacks of its threads to its output."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hstu.train.builder", "pytest", "hypothesis"])


@dataclass(frozen=True)
class Launch:
    """How many ranks are started, and how long they may take in all."""

    ranks: int
    timeout_s: float = 60.0
    tp: int = 1
    """Size of the tensor-parallel groups that ``run_cases`` starts."""
    cp: int = 1
    """Size of the context-parallel groups that it starts."""
    lasting: tuple[int, ...] = ()
    """Ranks that do not end by themselves. ``run_to_their_ends`` kills them after the others have ended."""


class RankFailure(Exception):
    """A rank failed or the launch ran out of time. ``rank`` is None for a timeout; ``stderr`` is its whole output.

    ``others``: what the ranks were doing for which the failed one waited in vain.
    """

    def __init__(self, message: str, rank: int | None, stderr: str, others: str = "") -> None:
        super().__init__(f"{message}\n{stderr[-STDERR_TAIL_CHARACTERS:]}\n{others}")
        self.rank = rank
        self.stderr = stderr


@dataclass(frozen=True)
class EndedRank:
    """How a rank ended. ``at``: seconds since the epoch."""

    exit_code: int
    output: str
    at: float


def run_ranks(launch: int | Launch, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
    """Call the function on every rank and return the results in rank order. An int is that many ranks for 60 s.

    Raises RankFailure as soon as one rank fails or when the time is over. The other ranks, which may be waiting for the
    one that failed, are killed.
    """
    launch = Launch(launch) if isinstance(launch, int) else launch
    with _launched(launch, function, args, kwargs) as ranks:
        ranks.wait()
        return [pickle.loads((ranks.folder / f"result{rank}").read_bytes()) for rank in range(launch.ranks)]


def run_cases(launch: int | Launch, cases: Mapping[str, Callable[[Mesh], Any]]) -> list[dict[str, Any]]:
    """Call each case with the mesh, one after the other in one launch; per rank, name → result.

    Starting ranks takes seconds, so cases that are compared share a launch. A case is usually a ``partial``.
    """
    launch = Launch(launch) if isinstance(launch, int) else launch
    return run_ranks(launch, call_each, cases, launch.tp, launch.cp)


def call_each(cases: Mapping[str, Callable[[Mesh], R]], tp: int = 1, cp: int = 1) -> dict[str, R]:
    """What ``run_cases`` runs on a rank."""
    with started_mesh(tp, cp) as mesh:
        return {name: case(mesh) for name, case in cases.items()}


@contextlib.contextmanager
def started_mesh(tp: int = 1, cp: int = 1, port: int | None = None) -> Iterator[Mesh]:
    """A process group whose ranks use one thread each: the tensors are tiny, and more threads would only wait.

    ``port``: where the ranks meet, for a second process group in one launch.
    """
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    mesh = start(tensor_parallel_size=tp, context_parallel_size=cp, timeout_s=60)
    torch.set_num_threads(1)
    yield mesh
    finish()
    _clear_sharding_prop_cache()  # which has the groups that have ended


def run_to_their_ends(
    launch: Launch, function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
) -> list[EndedRank]:
    """Call the function on ranks that may fail, and return how each ended, in rank order. No rank is killed early.

    Raises RankFailure if ranks other than ``launch.lasting`` have not ended when the time is over.
    """
    with _launched(launch, function, args, kwargs) as ranks:
        return ranks.wait_for_ends()


def run_script(*command: Any, ranks: int | None = None, timeout_s: float = 150.0) -> tuple[list[int], str]:
    """The exit code of each rank, and the output of all. ``ranks``: None for a script without a launcher."""
    words = [str(word) for word in command]
    ended = run_to_their_ends(Launch(ranks or 1, timeout_s), as_main, words, launched=ranks is not None)
    return [rank.exit_code for rank in ended], "".join(rank.output for rank in ended)


def as_main(command: list[str], launched: bool) -> None:
    """Be the script, with one thread."""
    for name in _environment(0, 1, 0) if not launched else ():
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def free_port() -> int:
    ports = random.SystemRandom()  # tests seed the usual one, and two at a time would draw the same ports
    while True:
        port = ports.randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def _launched(launch: Launch, function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[_Ranks]:
    with tempfile.TemporaryDirectory(prefix="hstu-ranks-") as directory:
        folder = Path(directory)
        (folder / "call").write_bytes(pickle.dumps((function, args, kwargs)))
        port = free_port()
        processes = [_start_rank(folder, rank, launch.ranks, port) for rank in range(launch.ranks)]
        name = getattr(function, "__qualname__", str(function))
        try:
            yield _Ranks(launch, name, folder, processes, time.monotonic() + launch.timeout_s)
        finally:
            for process in processes:
                _kill(process)


def _start_rank(folder: Path, rank: int, world_size: int, port: int) -> ForkServerProcess:
    environment = dict(os.environ) | _environment(rank, world_size, port)
    process = SERVER.Process(target=_run_this_rank, args=(folder, environment))
    process.start()
    return process


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@dataclass(frozen=True)
class _Ranks:
    """The processes of a launch. ``deadline`` is a time of the monotonic clock."""

    launch: Launch
    name: str
    folder: Path
    processes: list[ForkServerProcess]
    deadline: float

    def wait(self) -> None:
        """Wait until all have ended well; raise RankFailure for the first that has not."""
        while any(process.exitcode is None for process in self.processes):
            self._raise_failure()
            self._sleep()
        self._raise_failure()

    def wait_for_ends(self) -> list[EndedRank]:
        """Wait until all have ended, well or not."""
        ended_at: dict[int, float] = {}
        while len(ended_at) < self.launch.ranks - len(self.launch.lasting):
            for rank, process in enumerate(self.processes):
                if process.exitcode is not None:
                    ended_at.setdefault(rank, time.time())
            self._sleep()
        for rank in self.launch.lasting:
            _kill(self.processes[rank])
        return [
            EndedRank(process.exitcode or 0, self._stderr(rank), ended_at.get(rank, math.inf))
            for rank, process in enumerate(self.processes)
        ]

    def _sleep(self) -> None:
        if time.monotonic() > self.deadline:
            message = f"{self.name}: ranks {self._running()} still running after {self.launch.timeout_s:g} s"
            raise RankFailure(message, None, self._stacks())
        time.sleep(0.02)

    def _running(self) -> list[int]:
        return [rank for rank, process in enumerate(self.processes) if process.exitcode is None]

    def _stacks(self) -> str:
        """Where the running ranks are: the ends of their outputs after each has been told to add its stacks."""
        running = self._running()
        for rank in running:
            os.kill(self.processes[rank].pid or 0, STACKS)
        time.sleep(0.5)
        share = STDERR_TAIL_CHARACTERS // max(1, len(running))
        return "".join(f"--- rank {rank} ---\n{self._stderr(rank)[-share:]}\n" for rank in running)

    def _raise_failure(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.exitcode:
                message = f"{self.name}: rank {rank} of {self.launch.ranks} failed with exit code {process.exitcode}"
                others = self._stacks() if "timed out" in self._stderr(rank) else ""
                raise RankFailure(message, rank, self._stderr(rank), others)

    def _stderr(self, rank: int) -> str:
        output = self.folder / f"stderr{rank}.txt"
        return output.read_text(errors="replace") if output.exists() else ""


def _kill(process: ForkServerProcess) -> None:
    """Kill a rank with everything it started (each rank leads a session of its own)."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # raised once all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has not got as far as a session of its own
    process.join()


def _run_this_rank(folder: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.clear()  # the server's own is that of the first launch
    os.environ.update(environment)
    with (folder / f"stderr{environment['RANK']}.txt").open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    faulthandler.register(STACKS)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own; here the server's is inherited

    function, args, kwargs = pickle.loads((folder / "call").read_bytes())
    result = function(*args, **kwargs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    (folder / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
