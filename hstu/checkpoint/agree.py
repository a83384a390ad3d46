"""Collective work on a file system: all ranks did their part, or all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from hstu.config.errors import UserError
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh

T = TypeVar("T")


class CheckpointFailure(UserError):
    """The file system refused on some rank: a full disk, missing permissions. Raised on all ranks alike."""


def agree(part: Callable[[], T], mesh: Mesh) -> list[T]:
    """Do a rank's part of the work and learn whether all did theirs: all results, or an error on every rank alike.

    A user's error is raised as it is, a refusal of the file system as CheckpointFailure, anything else as RuntimeError.
    """
    mesh.progress.mark()
    result: T | None = None
    failure: Exception | None = None
    blamed = mesh.rank
    try:
        result = part()
    except CheckpointException as error:  # of torch.distributed.checkpoint; no Exception but a BaseException
        blamed, failure = _cause(error)
    except Exception as error:
        failure = error
    outcomes = gather_objects((result, failure, blamed), mesh.world_group)
    for _, problem, rank in outcomes:
        if isinstance(problem, UserError):
            raise problem
        if isinstance(problem, OSError):
            raise CheckpointFailure(f"checkpointing failed on rank {rank}: {problem}") from (failure or problem)
        if problem is not None:
            raise RuntimeError(f"checkpointing failed on rank {rank}: {problem}") from (failure or problem)
    return [value for value, _, _ in outcomes]


def _cause(error: CheckpointException) -> tuple[int, Exception]:
    """(rank, what went wrong there): that the file system refused, if it did; every rank is told of all."""
    for rank, (cause, _) in error.failures.items():
        if isinstance(cause, OSError):
            return rank, cause
    return next(iter(error.failures)), RuntimeError(str(error))
