"""The training loop: what is done when, what is recorded, and how a run ends."""

import gzip
import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.base.errors import UserError
from hstu.config.args import PartOptimizerArgs
from hstu.config.gin_io import load
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView
from hstu.pipeline.pipelines import SequentialPipeline
from tests.train.tiny import Train, build, run, tiny_config

# --- what is done when ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options", "records"),
    [
        (
            "ranking",
            {"max_train_iters": 5, "log_interval": 2, "eval_interval": 2, "eval_at_start": True},
            "valid 0, 2, valid 2, 4, valid 4, 5, valid 5",
        ),
        ("retrieval", {"log_interval": 4, "eval_interval": 2}, "valid 2, 4, valid 4, test 4"),
        ("retrieval", {"log_interval": 4, "eval_interval": 0}, "4, valid 4, test 4"),
        ("retrieval", {"log_interval": 4, "eval_interval": 0, "eval_at_end": False}, "4"),
    ],
)
def test_records_come_when_they_are_asked_for(train: Train, task: str, options: dict[str, Any], records: str) -> None:
    finished = train(task, trainer={"eval_at_end": True, **options})
    assert records == ", ".join(f"{record.get('split', '')} {record['iter']}".strip() for record in finished.records)


def test_a_loss_is_the_mean_since_the_record_before(train: Train) -> None:
    every, third = (train("ranking", trainer={"max_train_iters": 7, "log_interval": n}).losses for n in (1, 3))
    means = [sum(every[:3]) / 3, sum(every[3:6]) / 3, every[6]]
    assert third == pytest.approx(means, rel=1e-12)


def test_a_training_record_tells_what_it_cost(train: Train) -> None:
    record = train("ranking", schedule={"schedule": "linear"}).records[1]
    assert record["lr"] == pytest.approx(0.01 * 3 / 4)
    assert record["epoch"] == 1.0
    assert record["samples_per_s"] > 0 and record["tokens_per_s"] > record["samples_per_s"]
    assert 0 < record["data_wait"] < 1 and 0 < record["mfu"] < 1 and record["memory_bytes"] > 2**20


@pytest.mark.parametrize("first_part", [24, 7])
def test_by_epoch_learning_rates_change_at_the_ends_of_epochs_of_any_length(train: Train, first_part: int) -> None:
    trainer = {"tokens_per_rank": 40, "max_train_iters": 24, "ckpt_save_interval": 7, "ckpt_load_dir": "auto"}
    schedule = {"schedule": "linear", "by_epoch": True, "warmup_iters": 8, "warmup_start": 0.1, "decay_iters": 100}
    if first_part < 24:  # the rest is trained by a run that resumes in the midst of an epoch
        train("ranking", trainer=trainer | {"max_train_iters": first_part}, schedule=schedule)
    finished = train("ranking", trainer=trainer, schedule=schedule)
    plans = finished.trainer.source.train_sampler(SamplerPosition())
    epochs = [plan.epoch for plan in itertools.islice(plans, 24)]
    lengths = [epochs.count(epoch) for epoch in range(epochs[-1])]
    assert len(set(lengths)) > 1, "epochs of different lengths"
    rates = {(epoch, record["lr"]) for epoch, record in zip(epochs, finished.records, strict=True)}
    assert len(rates) == len(dict(rates)) == len(set(dict(rates).values())), "one for each epoch"


@pytest.mark.parametrize("pipeline", ["none", "native", "prefetch"])
@pytest.mark.parametrize("still", ["dense", "tables"])
def test_tables_follow_their_own_schedule_and_the_dense_part_follows_the_other(
    train: Train, store: SequenceStore, pipeline: str, still: str
) -> None:
    """A part whose rate is too small to move a float32 shows what the other one follows."""
    decays: Any = {"schedule": "warmup_stable_decay", "warmup_iters": 2, "decay_iters": 3}
    rates = {"learning_rate": 1e-30, "sparse_learning_rate": 0.01}
    rates = rates if still == "dense" else dict(zip(rates, [*rates.values()][::-1], strict=True))
    options: Any = {"optimizer": rates, "sharded": tuple(store.features)}
    trainer = {"max_train_iters": 8, "pipeline_type": pipeline, "ckpt_save_interval": 4}
    expected = train("ranking", schedule=decays, trainer=trainer, **options)
    apart = {"table_schedule": decays} if still == "dense" else {"schedule": decays, "table_schedule": {}}
    found = train("ranking", output="apart", trainer=trainer, **apart, **options)
    assert found.losses == expected.losses and len(set(found.losses)) == 8
    half = found.path.parent / "checkpoints" / "iteration_00000004"
    resumed = train("ranking", output="on", trainer=trainer | {"ckpt_load_dir": str(half)}, **apart, **options)
    assert resumed.losses == expected.losses[4:]
    moving = "lr_tables" if still == "dense" else "lr"
    lrs = [record[moving] for record in found.records]
    assert lrs == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.01, 0.02 / 3, 0.01 / 3])
    assert expected.records[3]["lr_tables"] == rates["sparse_learning_rate"]


def test_gradient_norms_are_what_sgd_subtracts_from_weights_and_tables(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    config = tiny_config("ranking", store, tmp_path, optimizer={"optimizer_str": "sgd", "learning_rate": 0.5})
    trainer = build(config, mesh)
    trainer.pipeline.step.measures_norms = True

    def flat(part: str) -> Tensor:
        found = [ShardedView.whole(each) for name, each in trainer.state.tensors().items() if name.startswith(part)]
        return torch.cat([shard.flatten() for view in found for shard in view.shards.values()])

    parts = {"grad_norm": "model.task.", "grad_norm_tables": "model.tables."}
    before = {norm: flat(part) for norm, part in parts.items()}
    norms = trainer.pipeline.progress(trainer.source.train_batches(SamplerPosition())).grad_norms
    for norm, part in parts.items():
        assert float(norms[norm]) == pytest.approx(float((flat(part) - before[norm]).norm()) / 0.5, rel=1e-5)
    trainer.run_directory.close()


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_log_lines_show_all_learning_rates(train: Train, task: str) -> None:
    parts = [PartOptimizerArgs(regex="uvqk", learning_rate=0.5), PartOptimizerArgs(regex="out")]
    optimizer = {"part_optimizers": parts, "sparse_learning_rate": 0.25}
    own = train(task, trainer={"log_interval": 2}, optimizer=optimizer)
    rates = [own.records[0][name] for name in ("lr", "lr_tables", "lr/uvqk", "lr/out")]
    assert rates == [0.01, 0.25, 0.5, 0.01]


def test_evaluating_in_between_does_not_change_training(train: Train) -> None:
    dropout = {"hidden_dropout": 0.3}
    for task in ("ranking", "retrieval"):
        often = train(task, trainer={"eval_interval": 1, "eval_at_start": True}, network=dropout)
        never = train(task, network=dropout)
        assert len(often.evaluations) == 5 and not never.evaluations
        assert often.losses == never.losses


def test_evaluation_can_be_limited_to_some_batches(train: Train) -> None:
    limited = {"eval_batch_size": 2, "max_eval_iters": 1, "eval_at_end": True}
    finished = train("retrieval", trainer=limited, task_args={"eval_metrics": ("HR@1",)})
    assert finished.metrics["HR@1"] in (0, 0.5, 1), "of two users"


def test_a_profile_of_the_chosen_iterations_is_written(train: Train) -> None:
    finished = train("ranking", trainer={"profile": True, "profile_step_start": 1, "profile_step_end": 3})
    with gzip.open(finished.path / "trace-rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::addmm" in names or "aten::linear" in names


# --- how a run ends ------------------------------------------------------------------------------------------------


def test_a_run_that_reaches_its_last_iteration_is_done(train: Train) -> None:
    finished = train("ranking", trainer={"eval_interval": 2, "eval_at_end": True})
    summary = finished.summary
    assert (summary["status"], summary["iterations"]) == ("done", 4)
    assert summary["last_metrics"]["valid"] == finished.metrics
    best = summary["best_metrics"]["valid"]["LOGLOSS"]
    evaluated = {r["iter"]: r["metrics"]["LOGLOSS"] for r in finished.records if r["kind"] == "eval"}
    assert best["value"] == min(evaluated.values()) == evaluated[best["iter"]]
    assert set(summary["throughput"]) == {"samples_per_s", "tokens_per_s", "tflops", "mfu"}
    assert summary["throughput"]["tokens_per_s"] > 0 and summary["seconds"] > 0


@pytest.mark.parametrize("saving", [True, False])
def test_sigterm_stops_after_the_step_in_flight_and_saves_where_checkpoints_are_kept(
    train: Train, monkeypatch: pytest.MonkeyPatch, saving: bool
) -> None:
    step, steps = SequentialPipeline.progress, itertools.count()

    def signalled(self: SequentialPipeline, batches: Any) -> Any:
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    monkeypatch.setattr(SequentialPipeline, "progress", signalled)
    options = {"max_train_iters": 50, "eval_at_end": True, "ckpt_save_interval": 100 if saving else -1}
    finished = train("ranking", trainer=options)
    assert (finished.summary["status"], finished.summary["iterations"]) == ("stopped", 3)
    assert finished.evaluations == []
    assert finished.saved == ["iteration_00000003"] * saving


# --- the best, and enough ------------------------------------------------------------------------------------------

WORSE_AND_WORSE = {"optimizer_str": "sgd", "learning_rate": 1e-9}
"""Too little to move a float32 weight: what is measured first stays the best."""


def test_training_ends_when_the_metric_has_not_improved_for_long_enough(train: Train) -> None:
    options = {
        "max_train_iters": 20,
        "eval_interval": 2,
        "eval_at_end": True,
        "ckpt_save_interval": 100,
        "best_metric": "NDCG@3",
        "early_stop_patience": 2,
        "log_interval": 5,
    }
    finished = train("retrieval", output="enough", trainer=options, optimizer=WORSE_AND_WORSE)
    summary = finished.summary
    assert (summary["status"], summary["iterations"]) == ("stopped early", 6)
    assert finished.evaluations == [(2, "valid"), (4, "valid"), (6, "valid"), (2, "test")], "the last one once"
    assert [record["iter"] for record in finished.records if record["kind"] == "train"] == [5, 6]
    assert summary["best"] == {
        "metric": "NDCG@3",
        "split": "valid",
        "value": finished.records[0]["metrics"]["NDCG@3"],
        "iter": 2,
    }
    assert finished.saved == ["iteration_00000002", "iteration_00000006"]
    assert (finished.path.parent / "checkpoints" / "best").resolve().name == "iteration_00000002"
    again = train("retrieval", output="enough", trainer=options | {"ckpt_load_dir": "auto"}, optimizer=WORSE_AND_WORSE)
    assert (again.summary["status"], again.summary["iterations"]) == ("stopped early", 6), "it remembers its patience"


def test_a_run_that_improves_goes_on_and_keeps_its_best(train: Train) -> None:
    options = {
        "max_train_iters": 12,
        "eval_interval": 3,
        "ckpt_save_interval": 5,
        "best_metric": "LOGLOSS",
        "best_metric_mode": "min",
        "early_stop_patience": 3,
    }
    finished = train("ranking", trainer=options)
    assert finished.summary["status"] == "done"
    evaluated = {r["iter"]: r["metrics"]["LOGLOSS"] for r in finished.records if r["kind"] == "eval"}
    best = min(evaluated, key=lambda iteration: evaluated[iteration])
    assert best > 3
    checkpoints = finished.path.parent / "checkpoints"
    assert (checkpoints / "best").resolve().name == f"iteration_{best:08d}"
    assert (checkpoints / "best" / "manifest.json").exists()


def test_evaluations_use_the_average_of_the_weights(train: Train) -> None:
    options = {"max_train_iters": 6, "eval_interval": 3}
    plain = train("ranking", trainer=options, sharded=())
    averaged = train("ranking", trainer=options, optimizer={"ema_decay": 0.999}, sharded=())
    still = train("ranking", trainer=options, optimizer={"learning_rate": 1e-12}, sharded=())
    assert averaged.losses == plain.losses != still.losses
    lost = [finished.metrics["LOGLOSS"] for finished in (plain, averaged, still)]
    assert lost[0] < lost[1] < 0.9 * lost[2], "the average follows the weights at a distance"


def test_intervals_of_epochs_go_on_where_a_run_stopped(train: Train) -> None:
    options: dict[str, Any] = {"log_interval": "1 epoch", "eval_interval": ".5epoch", "ckpt_save_interval": "1.5 epoch"}
    options |= {"max_train_iters": 13, "train_batch_size": 4, "save_at_end": False}
    whole = train("ranking", output="whole", trainer=options)
    samples = len(whole.trainer.source.train_lengths.items)
    assert samples % 4, "positions, not iterations, count"
    ends = [min(end, samples) for end in range(4, samples + 4, 4)]
    done = [0, *(epoch * samples + end for epoch in range(9) for end in ends)]
    halves = [at for at in range(1, 14) if 2 * done[at] // samples > 2 * done[at - 1] // samples]
    logged = [record["iter"] for record in whole.records if record["kind"] == "train"]
    assert logged == [*halves[1::2], *([13] if halves[1::2][-1] < 13 else [])]
    assert [at for at, _ in whole.evaluations] == halves and len(halves) > 4
    assert whole.saved == [f"iteration_{at:08d}" for at in halves[2::3]]

    cut = halves[2] + 1
    train("ranking", output="cut", trainer=options | {"max_train_iters": cut})
    again = train("ranking", output="cut", trainer=options | {"ckpt_load_dir": "auto"})
    straight, resumed = ([(r["kind"], r["iter"]) for r in each.records if r["iter"] > cut] for each in (whole, again))
    assert resumed == straight
    assert again.saved == whole.saved
    plain = train("ranking", trainer={"ckpt_save_interval": 2})
    assert "intervals" not in plain.trainer.state.carried, "checkpoints of other runs have what they had"


# --- going on ------------------------------------------------------------------------------------------------------


def test_the_best_ranker_is_chosen_by_users_that_the_test_does_not_have(train: Train) -> None:
    options = {"eval_interval": 2, "eval_at_end": True, "best_metric": "LOGLOSS"}
    finished = train("ranking", trainer=options, dataset={"train_fraction": 0.5, "valid_fraction": 0.2})
    assert finished.evaluations == [(2, "valid"), (4, "valid"), (4, "test")]
    assert finished.summary["best"]["split"] == "valid"
    source = finished.trainer.source
    users = [
        {int(user) for batch in source.eval_batches(split) for user in batch.user_ids} for split in ("valid", "test")
    ]
    assert users[0] and users[1] and not users[0] & users[1] - {-1}


@pytest.mark.parametrize("batch_size", [8, 16, 4])
def test_epochs_and_schedules_count_samples_whatever_the_global_batch(train: Train, batch_size: int) -> None:
    """The first two epochs have global batches of 8, as if they had been trained by another number of ranks."""
    options: dict[str, Any] = {"max_train_iters": None, "ckpt_load_dir": "auto", "ckpt_save_interval": 4}
    resized = options | {"num_train_epochs": 4, "train_batch_size": batch_size}
    train("ranking", output="resized", trainer=options | {"num_train_epochs": 2})
    found, whole = (
        train("ranking", output=output, trainer=resized, schedule={"schedule": "cosine"})
        for output in ("resized", "whole")
    )
    assert found.trainer.state.position == whole.trainer.state.position
    steps = whole.trainer.state.iteration // 2  # of two epochs
    assert found.trainer.state.iteration == 4 + steps
    resumed, expected = (
        [(record["epoch"], record["lr"]) for record in each.records if record["kind"] == "train"][-steps:]
        for each in (found, whole)
    )
    assert resumed == expected


def test_a_finished_run_that_is_started_again_only_evaluates(train: Train) -> None:
    options = {"ckpt_save_interval": 4, "ckpt_load_dir": "auto", "eval_at_end": True}
    first = train("retrieval", output="one", trainer=options)
    again = train("retrieval", output="one", trainer=options)
    assert again.summary["status"] == "done" and again.summary["iterations"] == 4
    assert again.metrics == first.metrics


def test_the_operative_configuration_trains_the_same_model(
    train: Train, mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    config = tiny_config("retrieval", store, tmp_path / "first", network={"hidden_dropout": 0.2})
    first = run(config, mesh)
    again = load([str(first.path / "operative.gin")], [f"TrainerArgs.output_dir = '{tmp_path}/second'"], "retrieval")
    assert first.losses == run(again, mesh).losses


def test_clipping_bounds_the_dense_step(train: Train, mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "sharded": ["item_id", "town", "action"],
        "optimizer": {"optimizer_str": "sgd", "learning_rate": 1.0},
    }
    untrained = build(tiny_config("ranking", store, tmp_path, **options), mesh)
    untrained.run_directory.close()
    before = dict(untrained.state.model.dense.named_parameters())

    def distance(max_grad_norm: float) -> float:
        finished = train("ranking", trainer={"max_train_iters": 1, "max_grad_norm": max_grad_norm}, **options)
        after = dict(finished.trainer.state.model.dense.named_parameters())
        with torch.no_grad():
            return math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in after))

    assert distance(0.0) > 0.2
    assert distance(0.1) == pytest.approx(0.1, rel=1e-4)
    assert distance(100.0) == distance(0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"trainer": {"ckpt_load_dir": "absent"}},
        {"task_args": {"prediction_head_arch": [8, 2]}},
        {"dataset": {"dataset_path": "absent"}},
    ],
    ids=["no such checkpoint", "a head that does not fit", "no such data"],
)
def test_a_run_that_cannot_begin_leaves_no_directory(train: Train, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        train("ranking", **options)
    assert list(tmp_path.glob("run0/*")) == []
