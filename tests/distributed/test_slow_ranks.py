"""A rank that computes or loads slowly is named, although all ranks take the same time for a step."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.parallel.mesh import Mesh
from hstu.train.trainer import Trainer
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.distributed.toy import dense_of
from tests.train.tiny import build, skip_measuring_the_peak, tiny_config, walks

SLEEP_S = 0.3


def in_forward(trainer: Trainer) -> None:
    dense_of(trainer.state.model).task.get_submodule("encoder").register_forward_pre_hook(
        lambda *_: time.sleep(SLEEP_S)
    )


def in_loading(trainer: Trainer) -> None:
    load = trainer.source.train_batches

    def batches(position: SamplerPosition) -> Iterator[HSTUBatch]:
        for batch in load(position):
            time.sleep(SLEEP_S)
            yield batch

    trainer.source.train_batches = batches  # type: ignore[method-assign]


def train(mesh: Mesh, task: str, slow_rank: int, slow: Any, directory: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a run, and what its log says of slow ranks."""
    skip_measuring_the_peak()
    config = tiny_config(task, directory, f"{directory}/{task}", trainer={"max_train_iters": 8, "train_batch_size": 4})
    trainer = build(config, mesh)
    trainer.run_directory.draw_curves = lambda: None  # type: ignore[method-assign]
    if mesh.rank == slow_rank:
        slow(trainer)
    written: list[dict[str, Any]] = []
    trainer.run_directory.write = lambda record: written.append(record.as_json())  # type: ignore[method-assign]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hstu.train.trainer").addHandler(handler)
    trainer.train()
    logging.getLogger("hstu.train.trainer").removeHandler(handler)
    return written, [line for line in lines if f"rank {slow_rank} (" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("store")
    write_small_store(Path(directory), **walks())
    cases = {
        "computing": partial(train, task="retrieval", slow_rank=1, slow=in_forward, directory=str(directory)),
        "data": partial(train, task="ranking", slow_rank=2, slow=in_loading, directory=str(directory)),
    }
    return run_cases(Launch(3), cases)[0]


@pytest.mark.parametrize(("what", "rank"), [("computing", 1), ("data", 2)])
def test_a_slow_rank_is_named_with_what_is_slow(runs: dict[str, Any], what: str, rank: int) -> None:
    records, lines = runs[what]
    slow, other = ("compute", "data_wait") if what == "computing" else ("data_wait", "compute")
    named = [record["slowest_rank"] for record in records]
    slowest = [record for record in records[1:] if record["slowest_rank"] == rank]  # the first step also connects
    assert len(slowest) > len(records) / 2, "others are only slow where the machine is busy"

    def usual(name: str) -> float:
        return median(record[name] for record in slowest)

    assert usual(f"slowest_{slow}_s") > 0.9 * SLEEP_S > 2 * usual(f"median_{slow}_s")
    assert usual(f"slowest_{other}_s") < 0.5 * SLEEP_S < usual("mean_collective_s"), "the two others wait for it"
    is_shown = [rank == each and record["slowest_excess"] >= 0.2 for each, record in zip(named, records, strict=True)]
    assert sum(line.startswith("iter ") for line in lines) == sum(is_shown) > 0
