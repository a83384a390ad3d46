"""What one rank sends and asks for does not grow with the number of ranks, beyond the sizes of what it receives."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.train.main import run_facts
from hstu.train.trainer import Trainer
from tests.conftest import write_small_store
from tests.distributed.launch import run_ranks
from tests.train.tiny import build, skip_measuring_the_peak, tiny_config, walks

FEW, MANY = 2, 4
COLLECTIVES = (
    *("allreduce", "allgather", "_allgather_base", "all_gather_single", "broadcast", "alltoall", "alltoall_base"),
    *("all_to_all_single", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "gather", "scatter"),
    *("barrier", "send", "recv"),
)
OBJECTS = "_tensor_to_object"
"""One for each pickled object that is received: of all ranks, where a checkpoint is planned."""
STORE = ("set", "get", "add", "wait", "compare_set", "check")


def counts_of_rank(task: str, store: str, output: str) -> dict[str, Counter[str]]:
    """Phase of a run → collectives, new groups, operations of the store, and exchanges of pickled objects."""
    found: dict[str, Counter[str]] = {}
    now: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            now[name] += 1
            return function(*arguments, **options)

        setattr(owner, name, counted)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        now.clear()
        yield
        found[name] = Counter(now)

    for owner, names in ((dist.ProcessGroup, COLLECTIVES), (dist.Store, STORE), (dist, ("new_group",))):
        for name in names:
            count(owner, name)
    count(dist.distributed_c10d, OBJECTS)
    Trainer._host_of = lambda *_: "here"  # type: ignore[method-assign]  # sent for whom chance makes the slowest rank
    quiet_libraries()
    skip_measuring_the_peak()
    trainer = {"train_batch_size": 4, "eval_batch_size": 20, "max_train_iters": 6, "max_eval_iters": 1}
    trainer |= {"ckpt_save_interval": 1000, "save_at_end": False}
    config = tiny_config(task, store, output, trainer=trainer)
    with phase("start"):
        mesh = meshes.start(timeout_s=60, must_agree=run_facts(config))
    with phase("build"):
        built = build(config, mesh)
        built._restore()
    with phase("steps"):
        built._train_loop()
    with phase("evaluation"):
        built.evaluate(built.source.eval_splits)
    with phase("checkpoint"):
        built._save()
    meshes.finish()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_counts_of_a_rank_are_those_of_fewer_ranks(task: str, tmp_path: Path) -> None:
    store = str(write_small_store(tmp_path / "store", **walks(200)).path)
    few, many = (run_ranks(size, counts_of_rank, task, store, str(tmp_path / str(size))) for size in (FEW, MANY))
    for rank, found in enumerate(few):
        for phase, counts in many[rank].items():
            objects = counts.pop(OBJECTS, 0), found[phase].pop(OBJECTS, 0)
            assert counts == found[phase], f"during {phase}, on rank {rank} of {FEW} and of {MANY}"
            assert objects == (0, 0) or phase != "steps", "no pickled object is sent"
    assert many[0]["steps"]["all_to_all_single"] and many[0]["checkpoint"]["gather"], "exchanges are counted"
