"""A run that SIGTERM stops and new processes resume is bit for bit the run that was never stopped.

The runs have dropout, shuffling, Adam, a loss scale that grows, averaged weights, accumulated gradients, evaluations,
and records of the mean loss over several steps, so that state that a checkpoint lacks changes the result.

The signal of one rank reaches all in the collective of the check that every step makes anyway.
"""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import pytest
import torch
import torch.distributed as dist

from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.splits import Split
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import FiniteCheck, Stopped, StopSignal
from hstu.train.trainer import Trainer
from tests.conftest import write_small_store
from tests.distributed.failure_cases import FAULTS
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import config_for, digest
from tests.train.tiny import OF_THE_ACTION, FinishedRun, TinyOptions, build, in_forward, walks

WHOLE, EVERY = 9, 4
STOPS: dict[str, tuple[int, str, int]] = {
    "mid-epoch": (5, "step", 5),
    "epoch end": (6, "step", 6),
    "mid-accumulation": (5, "micro-batch", 5),
    "in an evaluation": (4, "evaluation", 4),
}
"""In which iteration, at what, and after which iteration the run then stops. An epoch has 3; one evaluates every 4."""
TASKS: dict[str, Any] = {
    "ranking": {
        "task": "ranking",
        "precision": {"loss_scale": "dynamic", "growth_interval": 3},
        "dataset": {"max_num_candidates": 2},
        "task_args": OF_THE_ACTION,
    },
    "retrieval": {
        "task": "retrieval",
        "task_args": {"negatives": "uniform", "num_negatives": 5, "mask_seen": True},
    },
}


def stop_and_go(
    mesh: Mesh, task: str, store: str, output: str, stop: tuple[int, str] | None = None, **options: Unpack[TinyOptions]
) -> dict[str, Any]:
    """A whole run. ``stop``: the iteration, and the moment in it, in which the last rank gets SIGTERM."""
    trainer = build(config_for(mesh, task, store, output, options), mesh)
    if stop is not None and mesh.rank == mesh.world_size - 1:
        SIGNALLED[stop[1]](trainer, stop[0], Path(output) / "signalled_at")
    trainer.train()
    finished = FinishedRun(trainer, trainer.run_directory.path)
    weights = digest(trainer.state, mesh)
    if not mesh.is_main:
        return {}
    return {
        "weights": weights,
        "noise": torch.rand(2).tolist(),
        "history": trainer.state.carried_in_phase["history"].state_dict(),
        "records": [
            {name: record[name] for name in record if name.split("/")[0] in RECORDED} for record in finished.records
        ],
        "summary": {name: value for name, value in finished.summary.items() if name not in ("seconds", "throughput")},
        "position": [trainer.state.position.epoch, trainer.state.position.consumed],
        "batches_per_epoch": trainer.source.batches_per_epoch,
    }


RECORDED = ("kind", "iter", "epoch", "loss", "lr", "loss_scale", "skipped_steps", "metrics")


def _signal_in_micro_batch(trainer: Trainer, iteration: int, _: Path) -> None:
    """After the forward of the first micro-batch, before that of the second."""
    in_forward(trainer, iteration, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def _signal_in_evaluation(trainer: Trainer, iteration: int, _: Path) -> None:
    """Over the first batch."""
    batches = trainer.source.eval_batches

    def signalled(split: Split) -> Iterator[HSTUBatch]:
        if trainer.state.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(split)

    trainer.source.eval_batches = signalled  # type: ignore[method-assign]


SIGNALLED = {"step": FAULTS["SIGTERM"], "micro-batch": _signal_in_micro_batch, "evaluation": _signal_in_evaluation}


def case(
    place: Path, name: str, task: str, pipeline: str, stop: tuple[int, str] | None = None, **trainer: Any
) -> partial[dict[str, Any]]:
    options = {
        "gradient_accumulation_steps": 2,
        "max_train_iters": WHOLE,
        "log_interval": 3,
        "eval_interval": EVERY,
        "eval_at_end": True,
        "ckpt_save_interval": 100,
        "best_metric": "LOGLOSS/odd" if task == "ranking" else "NDCG@3",
        "best_metric_mode": "min" if task == "ranking" else "max",
        "max_grad_norm": 0.5,
        "pipeline_type": pipeline,
    }
    return partial(
        stop_and_go,
        store=str(place / "store"),
        output=str(place / name),
        stop=stop,
        **TASKS[task],
        network={"hidden_dropout": 0.3, "position_encoding": "relative_bias"},
        optimizer={"optimizer_str": "adam", "learning_rate": 0.02, "ema_decay": 0.8},
        schedule={"schedule": "cosine", "warmup_iters": 3},
        trainer=options | trainer,
    )


def run_all(place: Path, size: int, task: str, stops: dict[str, str]) -> dict[str, Any]:
    """Case → what rank 0 tells: the uninterrupted run, each stopped one, and each resumed one in new processes."""
    batch = 2 * max(size, 2)
    write_small_store(place / "store", **walks((22 if task == "retrieval" else 31) * batch // 4))
    sizes: dict[str, Any] = {"train_batch_size": batch, "eval_batch_size": batch}
    stopped, resumed = {}, {}
    for name, pipeline in stops.items():
        stopped[name] = case(place, name, task, pipeline, STOPS[name][:2], **sizes)
        resuming: dict[str, Any] = sizes | {"ckpt_load_dir": f"{place / name}/checkpoints"}
        resumed[f"{name}, resumed"] = case(place, f"{name}, resumed", task, pipeline, **resuming)
    whole = {"whole": case(place, "whole", task, "none", **sizes)}
    launch = Launch(size, timeout_s=200)
    return run_cases(launch, whole | stopped)[0] | run_cases(launch, resumed)[0]


def after(records: list[dict[str, Any]], iteration: int) -> list[dict[str, Any]]:
    return [record for record in records if record["iter"] > iteration]


@pytest.mark.parametrize(
    ("size", "task", "stops"),
    [
        (1, "ranking", {"mid-accumulation": "native", "in an evaluation": "prefetch", "epoch end": "none"}),
        pytest.param(2, "retrieval", {"mid-epoch": "prefetch", "in an evaluation": "native"}, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, size: int, task: str, stops: dict[str, str]
) -> None:
    told = run_all(tmp_path, size, task, stops)
    whole = told["whole"]
    assert whole["batches_per_epoch"] == 3 and whole["summary"]["status"] == "done"
    assert len({record["loss"] for record in whole["records"] if record["kind"] == "train"}) == 3
    for name in stops:
        _, at, stopped_after = STOPS[name]
        first, second = told[name], told[f"{name}, resumed"]
        assert (first["summary"]["status"], first["summary"]["iterations"]) == ("stopped", stopped_after), name
        evaluated = [record for record in first["records"] if record["kind"] == "eval"]
        assert len(evaluated) == (0 if at == "evaluation" else 1), name
        redone = stopped_after - 1 if at == "evaluation" else stopped_after
        assert second["records"] == after(whole["records"], redone), name
        for what in ("weights", "noise", "history", "summary", "position"):
            assert second[what] == whole[what], (name, what)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_phase_goes_on_as_if_it_had_not_been(tmp_path: Path, size: int) -> None:
    """The phase trains on a store that has grown by events and an item, whose code shifts all others."""
    whole, batch = walks(60, seed=3), 2 * max(size, 2)
    known = [len(row) - 3 for row in whole["items"]]
    first = {name: [row[:stop] for row, stop in zip(whole[name], known, strict=True)] for name in ("items", "actions")}
    store = write_small_store(tmp_path / "store", **whole | first)
    options: dict[str, Any] = {"train_batch_size": batch, "eval_batch_size": batch}
    begun = case(tmp_path, "begun", "retrieval", "native", **options)
    run_cases(Launch(size, timeout_s=200), {"begun": begun})
    items = [[item + 1 for item in row[:-3]] + [0] + [item + 1 for item in row[-2:]] for row in whole["items"]]
    grown = {"items": items, "item_ids": range(995, 995 + 12), "num_items": 12}
    segments = [[0] * number + [1] * 3 for number in known]
    write_small_store(tmp_path / "store", **whole | grown, segments=segments, earlier=store)
    options |= {"ckpt_load_dir": str(tmp_path / "begun" / "checkpoints"), "continue_on": "new_events"}
    cases = {"whole": case(tmp_path, "whole", "retrieval", "none", **options)}
    cases |= {"stopped": case(tmp_path, "stopped", "retrieval", "native", (WHOLE + 5, "step"), **options)}
    told = run_cases(Launch(size, timeout_s=200), cases)[0]
    resumed = case(tmp_path, "stopped", "retrieval", "prefetch", **options | {"ckpt_load_dir": "auto"})
    second, straight = run_cases(Launch(size, timeout_s=200), {"resumed": resumed})[0]["resumed"], told["whole"]
    assert [told[name]["summary"]["iterations"] for name in ("stopped", "whole")] == [WHOLE + 5, 2 * WHOLE]
    assert [record for record in second["records"] if record["kind"] != "resumed"] == straight["records"]
    for what in ("weights", "noise", "history", "summary", "position"):
        assert second[what] == straight[what], what


def check_two_steps(mesh: Mesh, deferred: bool) -> dict[str, Any]:
    """The last rank receives SIGTERM before the first of two checked steps."""
    check = FiniteCheck(mesh)
    check.deferred = deferred
    stop = StopSignal(mesh, check)
    all_reduce, collectives, raised = dist.all_reduce, [], []

    def counted(*args: Any, **options: Any) -> Any:
        collectives.append(1)
        return all_reduce(*args, **options)

    dist.all_reduce = counted
    try:
        if mesh.rank == mesh.world_size - 1:
            stop._receive(signal.SIGTERM, None)
        for _ in range(2):
            check(torch.ones(1), torch.tensor(True), None)  # type: ignore[arg-type]  # a batch is for errors
            try:
                stop.raise_if_agreed()
                raised.append("")
            except Stopped as stopped:
                raised.append(str(stopped))
    finally:
        dist.all_reduce = all_reduce
    return {"raised": raised, "collectives": len(collectives)}


@pytest.mark.parametrize(("ranks", "tp", "collectives"), [(2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_all_ranks_stop_after_the_same_step_without_a_collective_of_their_own(
    ranks: int, tp: int, collectives: int
) -> None:
    cases = {
        "at once": partial(check_two_steps, deferred=False),
        "one step later": partial(check_two_steps, deferred=True),
    }
    for rank in run_cases(Launch(ranks, 60, tp=tp), cases):
        counted = {"collectives": 2 * collectives}
        assert rank["at once"] == counted | {"raised": ["SIGTERM", "SIGTERM"]}
        assert rank["one step later"] == counted | {"raised": ["", "SIGTERM"]}
