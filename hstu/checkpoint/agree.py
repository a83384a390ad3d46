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
    try:
        result = part()
    except CheckpointException as error:  # of torch.distributed.checkpoint; no Exception but a BaseException
        failure = _cause(error)
    except Exception as error:
        failure = error
    outcomes = gather_objects((result, failure), mesh.world_group)
    for rank, (_, problem) in enumerate(outcomes):
        if isinstance(problem, UserError):
            raise problem
        if isinstance(problem, OSError):
            raise CheckpointFailure(f"checkpointing failed on rank {rank}: {problem}") from (failure or problem)
        if problem is not None:
            raise RuntimeError(f"checkpointing failed on rank {rank}: {problem}") from (failure or problem)
    return [value for value, _ in outcomes]


def _cause(error: CheckpointException) -> Exception:
    """What the file system said, if it was that."""
    for cause, _ in error.failures.values():
        if isinstance(cause, OSError):
            return cause
    return RuntimeError(str(error))
