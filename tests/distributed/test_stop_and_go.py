"""A run that SIGTERM stops and new processes resume is bit for bit the run that was never stopped.

The runs have dropout, shuffling, Adam, a loss scale that grows, averaged weights, accumulated gradients, evaluations,
and records of the mean loss over several steps, so that state that a checkpoint lacks changes the result.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.distributed.training_cases import stop_and_go
from tests.train.tiny import walks

WHOLE, EVERY = 9, 4
STOPS: dict[str, tuple[int, str, int]] = {
    "mid-epoch": (5, "step", 5),
    "epoch end": (6, "step", 6),
    "mid-accumulation": (5, "micro-batch", 5),
    "in an evaluation": (4, "evaluation", 4),
}
"""In which iteration, at what, and after which iteration the run then stops. An epoch has 3; one evaluates every 4."""
TASKS: dict[str, Any] = {
    "ranking": {"task": "ranking", "precision": {"loss_scale": "dynamic", "growth_interval": 3}},
    "retrieval": {
        "task": "retrieval",
        "task_args": {"negatives": "uniform", "num_negatives": 5, "mask_seen": True},
    },
}


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
        "best_metric": "LOGLOSS" if task == "ranking" else "NDCG@3",
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
    sizes = {"train_batch_size": batch, "eval_batch_size": batch}
    stopped, resumed = {}, {}
    for name, pipeline in stops.items():
        stopped[name] = case(place, name, task, pipeline, STOPS[name][:2], **sizes)
        checkpoints = {"ckpt_load_dir": f"{place / name}/checkpoints"}
        resumed[f"{name}, resumed"] = case(place, f"{name}, resumed", task, pipeline, **sizes, **checkpoints)
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
