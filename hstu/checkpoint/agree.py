"""Collective work on a file system: all ranks did their part, or all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from hstu.config.errors import DataError
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh

T = TypeVar("T")


def agree(part: Callable[[], T], mesh: Mesh) -> list[T]:
    """Do a rank's part of the work and learn whether all did theirs: all results, or an error on every rank alike.

    CheckpointException, which torch.distributed.checkpoint raises, is no Exception but a BaseException.
    """
    mesh.progress.mark()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = part()
    except CheckpointException as error:
        failure = RuntimeError(str(error))
    except Exception as error:
        failure = error
    outcomes = gather_objects((result, failure), mesh.world_group)
    for rank, (_, problem) in enumerate(outcomes):
        if isinstance(problem, DataError):
            raise problem
        if problem is not None:
            raise RuntimeError(f"checkpointing failed on rank {rank}: {problem}") from (failure or problem)
    return [value for value, _ in outcomes]
