"""Which checkpoint of a run is used: the best where the run chose one, in its own last evaluation and by every tool."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hstu import api
from hstu.base.errors import DataError
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from scripts import embed, evaluate, export, predict, quickstart_report, recommend
from tests.train.tiny import FinishedRun, Train, run, tiny_config

BEST, LAST = "iteration_00000004", "iteration_00000006"
SELECTS = {"best_metric": "NDCG@3", "ckpt_save_interval": 1000, "eval_interval": 2, "eval_at_end": True}


@pytest.fixture(scope="module")
def train(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``train()``: a run of 6 iterations whose best is iteration 4, as training then makes it worse."""
    output = tmp_path_factory.mktemp("best")

    def trained(name: str, task: str = "retrieval", **options: Any) -> FinishedRun:
        trainer: dict[str, Any] = {**SELECTS, "max_train_iters": 6, **options.pop("trainer", {})}
        trainer["best_metric_mode"] = "min" if trainer["best_metric"] == "LOGLOSS" else "max"
        optimizer = {"optimizer_str": "adam", "learning_rate": 0.3, **options.pop("optimizer", {})}
        return run(tiny_config(task, store, output / name, trainer=trainer, optimizer=optimizer, **options), mesh)

    return trained


@pytest.fixture(scope="module")
def finished(train: Train) -> FinishedRun:
    found = train("mine")
    assert found.summary["best"]["iter"] == 4, "the run must get worse"
    return found


@pytest.mark.parametrize(("which", "name"), [(None, BEST), ("best", BEST), ("last", LAST), ("6", LAST), ("4", BEST)])
def test_the_checkpoint_of_a_run_is_the_best_or_the_one_named(
    finished: FinishedRun, mesh: Mesh, which: str | None, name: str
) -> None:
    trained = api.load(finished.path, which, mesh=mesh)
    assert trained.checkpoint.name == name
    said = [f"{BEST} is used, the best by NDCG@3. --ckpt last takes {LAST}."]
    assert trained.report == (said if which is None else [])
    assert api.load(finished.path.parent / "checkpoints", mesh=mesh).checkpoint.name == BEST


def test_the_test_split_is_evaluated_on_the_best_as_evaluate_does(finished: FinishedRun, mesh: Mesh) -> None:
    assert finished.evaluations[-2:] == [(6, "valid"), (4, "test")]
    assert finished.records[-1]["epoch"] == pytest.approx(4 * finished.records[-2]["epoch"] / 6)
    assert finished.metrics == api.load(finished.path, mesh=mesh).evaluate("test")
    assert finished.metrics != api.load(finished.path, "last", mesh=mesh).evaluate("test")
    end = (finished.path / "log.txt").read_text()
    assert f"next: python scripts/evaluate.py --run_dir {finished.path}\n" in end
    assert f"python scripts/export.py --run_dir {finished.path} --output exports/run --program\n" in end
    assert finished.summary["iterations"] == 6 and finished.summary["last_metrics"]["test"] == finished.metrics


@pytest.mark.parametrize("script", [evaluate, predict, recommend, embed, export])
def test_every_tool_takes_the_best_and_says_so(
    script: ModuleType, finished: FinishedRun, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--users", "100"] if script is recommend else []
    for which, said in (([], True), (["--ckpt", "last"], False)):
        output = here / f"out{len(which)}"
        assert script.main(["--run_dir", str(finished.path), *which, "--output", str(output), *more]) == 0
        assert (f"note: {BEST} is used, the best by NDCG@3" in capsys.readouterr().err) is said


def test_the_report_of_a_run_of_ones_own_says_what_it_has(
    finished: FinishedRun, train: Train, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``here`` runs the script on the rank of this process."""
    assert quickstart_report.main(["--run_dir", str(finished.path)]) == 0
    printed = capsys.readouterr().out
    assert "popularity" in printed and "user 100\n" in printed and "\nvalid: HR@3 " in printed
    ranking = train("ranking", "ranking", trainer={"best_metric": "LOGLOSS"})
    assert quickstart_report.main(["--run_dir", str(ranking.path)]) == 0
    assert "\nvalid: AUC " in capsys.readouterr().out


def test_mistakes_name_what_there_is(finished: FinishedRun, mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=f"has no checkpoint '3'; it has {LAST}, {BEST}, iteration_00000002"):
        api.load(finished.path, "3", mesh=mesh)
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", "last"])
    assert "--ckpt last needs --run_dir" in capsys.readouterr().err


def test_training_goes_on_from_the_last_and_without_a_metric_the_last_is_used(train: Train, mesh: Mesh) -> None:
    first = train("on")
    resumed = train("on", trainer={"ckpt_load_dir": "auto", "max_train_iters": 8}, optimizer={"learning_rate": 9.0})
    assert [r["iter"] for r in resumed.records if r["kind"] == "train"] == list(range(1, 9))
    assert resumed.metrics == first.metrics, "of the same best"
    again = train("on", trainer={"ckpt_load_dir": "auto", "max_train_iters": 8}, optimizer={"learning_rate": 9.0})
    assert again.records == resumed.records
    unselected = train("on", trainer={"ckpt_load_dir": "auto", "max_train_iters": 9, "best_metric": None})
    assert unselected.evaluations[-1] == (9, "test")
    for path in (unselected.path, unselected.path.parent / "checkpoints"):
        assert api.load(path, mesh=mesh).checkpoint.name == "iteration_00000009"
