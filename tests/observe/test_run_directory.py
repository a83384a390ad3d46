import contextlib
import json
import math
import os
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from hstu.base.errors import ConfigError, UserError
from hstu.observe import environment
from hstu.observe.environment import (
    STACKS,
    check_packages,
    installed_releases,
    let_idle_threads_sleep,
    missing_packages,
)
from hstu.observe.plots import draw_curves, metric_curves
from hstu.observe.records import EvalRecord, read_metrics
from hstu.observe.run_directory import RunDirectory, default_path
from tests.observe.test_logging import record as train


def evaluation(iteration: int, **metrics: float) -> EvalRecord:
    return EvalRecord(iteration=iteration, epoch=1.0, split="valid", metrics=metrics)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_run_leaves_its_configuration_its_metrics_its_curves_and_a_summary(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path / "deep" / "run", "A.b = 1\n")) as run:
        assert run.path.joinpath("operative.gin").read_text() == "A.b = 1\n"
        run.write(train(10))
        run.write(evaluation(10, **{"HR@10": 0.25}))
        run.write_summary(
            status="done", iterations=10, best_metrics={"HR@10": 0.25}, last_metrics={"MRR": math.nan},
            throughput={"samples_per_s": 100.0}, seconds=3.5, note="extra",
        )  # fmt: skip
        image = run.draw_curves()
    assert image is not None
    assert image.read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["best_metrics"] == {"HR@10": 0.25}
    assert summary["last_metrics"] == {"MRR": None}
    assert summary["note"] == "extra"


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path, "")) as run:
        run.write(train(1, loss=math.nan, mfu=math.inf, lr=np.float32(0.5), memory_bytes=np.int64(7)))
        run.write(evaluation(1, AUC=np.float64("nan")))
    first, second = lines(run.metrics_file)
    assert (first["loss"], first["mfu"], first["lr"], first["memory_bytes"]) == (None, None, 0.5, 7)
    assert second["metrics"] == {"AUC": None}


def test_a_directory_that_holds_a_run_is_continued_and_loses_nothing(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path, "A.b = 1\n")) as run:
        run.write(train(10))
    with closing(RunDirectory(tmp_path, "A.b = 2\n", continues=True)) as run:
        run.write(train(20))
    first, marker, second = lines(run.metrics_file)
    assert (first["iter"], second["iter"]) == (10, 20)
    assert (marker["kind"], marker["configuration_changed"]) == ("resumed", True)
    assert (tmp_path / "operative.gin").read_text() == "A.b = 2\n"
    assert (tmp_path / "operative-1.gin").read_text() == "A.b = 1\n"

    RunDirectory(tmp_path, "A.b = 2\n", continues=True).close()
    assert not (tmp_path / "operative-2.gin").exists()  # the same configuration is not kept twice
    assert lines(run.metrics_file)[-1]["configuration_changed"] is False


def test_a_run_that_does_not_resume_leaves_the_files_of_the_earlier_one_alone(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path, "A.b = 1\n", identity="first")) as run:
        run.write(train(10))
        run.write_summary(status="done", iterations=10)
    (tmp_path / "checkpoints").mkdir()
    with closing(RunDirectory(tmp_path, "A.b = 1\n", identity="second")) as run:
        run.write(train(5))
    assert run.earlier == tmp_path / "previous-1"
    assert [record["iter"] for record in lines(run.metrics_file)] == [5]
    assert [record["iter"] for record in lines(run.earlier / "metrics.jsonl")] == [10]
    assert (tmp_path / "run.json").read_text() == "second"
    kept = {path.name for path in run.earlier.iterdir()}
    assert kept == {"run.json", "operative.gin", "metrics.jsonl", "summary.json"}
    with closing(RunDirectory(tmp_path, "")) as third:
        assert third.earlier == tmp_path / "previous-2"


def test_a_directory_in_which_a_run_is_writing_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path, "A.b = 1\n", identity="first")) as run:
        run.write(train(10))
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for continues in (False, True):
            with pytest.raises(ConfigError, match=rf"output_dir: .* in use by a run .*process {os.getpid()}"):
                RunDirectory(tmp_path, "A.b = 2\n", identity="second", continues=continues)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not (tmp_path / ".lock").exists()


def test_reading_drops_what_a_killed_attempt_did_in_vain(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path, "")) as run:
        for iteration in (10, 20, 30):
            run.write(train(iteration, loss=float(iteration)))
    with run.metrics_file.open("a") as file:
        file.write('7\n{"kind": []}\n{"kind": "train", "iter": "x"}\n{"kind": "eval", "iter": 10}\n')  # no records
        file.write('{"kind": "train", "iter": 40, "lo')  # killed while writing
    with closing(RunDirectory(tmp_path, "", continues=True)) as run:  # its checkpoint was of iteration 10
        run.write(train(20, loss=-20.0))
    assert [(record["iter"], record["loss"]) for record in read_metrics(run.metrics_file)] == [(10, 10.0), (20, -20.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", "A.b = 1\n", is_main=False, tensorboard=True)
    run.write(train(1))
    run.write(evaluation(1, AUC=0.5))
    run.write_summary(status="done", iterations=1, best_metrics={}, last_metrics={}, throughput={}, seconds=1.0)
    assert run.draw_curves() is None
    assert run.log_file is None
    run.close()
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError) as error:
        RunDirectory(tmp_path / "file" / "run", "")
    assert "TrainerArgs.output_dir" in str(error.value)
    assert str(tmp_path / "file" / "run") in str(error.value)
    assert "give another directory" in str(error.value)


def test_the_default_directory_is_named_after_the_gin_file_and_never_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "19700101-000000")
    paths = []
    for _ in range(3):
        path = default_path(["base.gin", "configs/ml_1m_ranking.gin"])
        path.mkdir(parents=True)
        paths.append(path.name)
    assert len(set(paths)) == 3
    assert all(name.startswith("ml_1m_ranking-19") for name in paths)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path, "", tensorboard=True)) as run:
        run.write(train(10, loss=2.5))
        run.write(evaluation(10, **{"HR@10": 0.25}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("valid/HR@10")] == [(10, 0.25)]


def test_weights_and_biases_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb_project = 'mine' needs .* pip install 'hstu-trainer\[wandb\]'"):
        RunDirectory(tmp_path, "", wandb_project="mine")


def test_weights_and_biases_gets_the_same_numbers_and_a_continued_run_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, float]] = []
    begun: list[dict[str, Any]] = []
    service = SimpleNamespace(log=sent.append, define_metric=lambda *_, **__: None, finish=lambda exit_code: None)

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return service

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, init=init))
    config = {"NetworkArgs": {"hidden_size": 64}}
    for iteration in (10, 20):
        with closing(RunDirectory(tmp_path, "", wandb_project="mine", config=config)) as run:
            run.write(train(iteration, loss=iteration / 4))
            run.write(evaluation(iteration, **{"HR@10": 0.25}))
    assert [(row["iter"], row["train/loss"]) for row in sent if "train/loss" in row] == [(10, 2.5), (20, 5.0)]
    assert [(row["iter"], row["valid/HR@10"]) for row in sent if "valid/HR@10" in row] == [(10, 0.25), (20, 0.25)]
    assert {options["id"] for options in begun} == {(tmp_path / "wandb_id.txt").read_text()}
    assert begun[0]["config"] == config


def test_a_run_that_cannot_begin_leaves_no_directory_and_an_earlier_run_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new", "A.b = 1\n", identity="first", tensorboard=True)
    run.discard()
    assert not (tmp_path / "new").exists()
    with closing(RunDirectory(tmp_path / "old", "A.b = 1\n", identity="first")) as first:
        first.write_summary(status="done")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for continues in (False, True):
        RunDirectory(tmp_path / "old", "A.b = 1\n", identity="first", continues=continues).discard()
        after = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
        if not continues:
            assert after == before
    assert (tmp_path / "old" / "metrics.jsonl").exists()


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: f"torch {stack['torch']}")
def test_each_tested_stack_is_in_the_ranges_of_the_package_and_on_the_page(
    stack: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "installed_releases", lambda: {**stack, "torch": f"{stack['torch']}.1+cpu"})
    check_packages()
    assert capsys.readouterr().err == ""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    required = {each.name: each.specifier for each in map(Requirement, lines)}
    for package, release in stack.items():
        assert f"{release}.0" in required[package]
    assert f"| {' | '.join(stack.values())} |" in (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")


def test_the_tests_run_with_one_of_the_stacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert installed_releases().keys() == STACKS[0].keys()
    check_packages()
    assert capsys.readouterr().err == ""


def test_untested_releases_are_a_warning_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = {"torch": "2.11.0+cu130", "torchrec": "1.8.0", "fbgemm-gpu": "1.6.0"}
    for versions in (mixed, {**STACKS[0], "torch": "2.14.0"}):
        monkeypatch.setattr(environment, "installed_releases", lambda found=versions: found)
        check_packages()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: untested releases: torch {versions['torch']}, ")
        assert "scripts/install.sh installs releases that belong together: torch 2.13, torchrec 1.8 and" in line


def test_missing_packages_are_an_error_with_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_releases", lambda: {"torch": "2.13.0"})
    with pytest.raises(UserError, match=r"missing packages: torchrec, fbgemm-gpu\. scripts/install\.sh installs"):
        check_packages()
    monkeypatch.setattr(environment, "installed_releases", lambda: {"torch": "2.12.1", "fbgemm-gpu": "1.7.0"})
    with pytest.raises(UserError, match=r"missing packages: torchrec\. pip install --no-deps 'torchrec==1\.7\.\*'"):
        check_packages()
    assert missing_packages(["torch", "no_such_package"]) == ["no_such_package"]


def test_checking_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from hstu.observe.environment import check_packages\n"
        "check_packages()\n"
        "print([name for name in ('torch', 'torchrec', 'fbgemm_gpu', 'pandas') if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_idle_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    let_idle_threads_sleep()
    assert os.environ == {"OMP_WAIT_POLICY": "passive"}
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}):
        monkeypatch.setattr("os.environ", dict(given))
        let_idle_threads_sleep()
        assert os.environ == given


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def losses(count: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "iter": 10 * (i + 1), "loss": 8 / (i + 1)} for i in range(count)]


def evaluations() -> list[dict[str, Any]]:
    return [
        {"kind": "eval", "iter": 100, "split": "valid", "metrics": {"HR@10": 0.1, "MRR": None}},
        {"kind": "eval", "iter": 200, "split": "valid", "metrics": {"HR@10": 0.2, "MRR": 0.1}},
        {"kind": "eval", "iter": 200, "split": "test", "metrics": {"HR@10": 0.15}},
    ]


def test_each_metric_has_a_panel_with_its_tasks_by_name_and_without_undefined_values() -> None:
    names = ("AUC", "AUC/task0", "AUC/task1", "NE")
    metrics = {**dict.fromkeys(names, 0.5), "MRR": None}
    records = [{"kind": "eval", "iter": 1, "split": "valid", "metrics": metrics}]
    points = [(1, 0.5)]
    assert metric_curves(records, ["click", "like"]) == {
        "AUC": {("valid", ""): points, ("valid", "click"): points, ("valid", "like"): points},
        "NE": {("valid", ""): points},
    }
    assert ("valid", "task1") in metric_curves(records)["AUC"]


@pytest.mark.parametrize("count", [3, 50])
def test_the_best_iteration_is_marked_and_the_legend_names_what_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    marked, legends = list[Any](), list[list[str]]()
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **_: marked.append(x))
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: legends.extend(a.get_legend_handles_labels()[1] for a in self.axes)
    )
    metrics = {"AUC/click": 0.7, "AUC/like": 0.6}
    records = [{"kind": "eval", "iter": 200, "split": "valid", "metrics": metrics}]
    several = [{**record, "loss/click": record["loss"] / 4, "loss/task1": None} for record in losses(count)]
    several[-1]["loss/task1"] = 0.25
    metrics_file = write(tmp_path / "metrics.jsonl", several + records)
    with contextlib.suppress(FileNotFoundError):  # nothing is saved
        draw_curves(metrics_file, tmp_path / "curves.png", ["click", "like"], best=200)
    assert marked == [200, 200]
    expected = [["click", "like", "sum"], ["click", "like"]]
    assert [[label.split()[0] for label in labels] for labels in legends] == expected


@pytest.mark.parametrize("records", [losses(1), evaluations(), losses(50) + evaluations()])
def test_short_and_long_runs_can_be_drawn(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    metrics = write(tmp_path / "metrics.jsonl", records)
    assert draw_curves(metrics, tmp_path / "curves.png") is not None


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    assert draw_curves(tmp_path / "absent.jsonl", tmp_path / "curves.png") is None
    undefined = write(tmp_path / "metrics.jsonl", [{"kind": "train", "iter": 1, "loss": None}])
    assert draw_curves(undefined, tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()
