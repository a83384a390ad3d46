"""Where runs write and save, and what of earlier runs and of others they leave alone."""

import dataclasses
from pathlib import Path

import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.find import locate
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.records import read_metrics
from hstu.parallel.mesh import Mesh
from tests.train.tiny import Train, run, tiny_config


def saved_iterations(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iteration_")) for path in directory.glob("iteration_*"))


def test_by_default_the_last_state_is_saved_in_a_directory_of_the_run_and_the_log_says_so(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_hstu: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    default = {"ckpt_save_interval": None, "ckpt_save_dir": None, "max_train_iters": 2}
    for name in ("first", "second"):
        train("ranking", trainer=default | {"output_dir": f"runs/{name}"})
        assert saved_iterations(tmp_path / "checkpoints" / name) == [2]
        assert f"checkpoints: the last state, in checkpoints/{name}" in warnings_of_hstu.text
        assert f"saved checkpoints/{name}/iteration_00000002" in warnings_of_hstu.text
        assert locate(f"runs/{name}").resolve() == tmp_path / "checkpoints" / name / "iteration_00000002"

    train("ranking", trainer=default | {"output_dir": "runs/third", "ckpt_save_interval": -1})
    assert "checkpoints: none, because TrainerArgs.ckpt_save_interval = -1" in warnings_of_hstu.text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["first", "second"]
    with pytest.raises(DataError, match="third has saved no checkpoint"):
        locate("runs/third")


def test_a_run_that_starts_again_keeps_its_checkpoints_only_if_it_resumes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    default = {"ckpt_save_interval": None, "ckpt_save_dir": None, "output_dir": "runs/mine"}
    first = train("ranking", trainer=default | {"max_train_iters": 2})
    anew = train("ranking", trainer=default | {"max_train_iters": 3})
    assert saved_iterations(tmp_path / "checkpoints" / "mine") == [2]
    assert saved_iterations(tmp_path / "checkpoints" / "mine-2") == [3]
    assert [record["iter"] for record in anew.records] == [1, 2, 3]
    kept = read_metrics(first.path / "previous-1" / "metrics.jsonl")
    assert [record["iter"] for record in kept] == [1, 2]

    resumed = train("ranking", trainer=default | {"max_train_iters": 5, "ckpt_load_dir": "auto"})
    assert saved_iterations(tmp_path / "checkpoints" / "mine-2") == [3, 5]
    assert [record["iter"] for record in resumed.records] == [1, 2, 3, 4, 5]
    assert '"kind": "resumed"' in (resumed.path / "metrics.jsonl").read_text()
    assert locate("runs/mine").resolve() == tmp_path / "checkpoints" / "mine-2" / "iteration_00000005"


def test_auto_without_a_directory_finds_what_the_same_file_has_saved(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for iterations in (2, 4):
        nowhere = {"ckpt_save_dir": None, "output_dir": None, "ckpt_save_interval": None, "ckpt_load_dir": "auto"}
        config = tiny_config("ranking", store, "", trainer=nowhere | {"max_train_iters": iterations})
        run(dataclasses.replace(config, source_files=("configs/mine.gin",)), mesh)
    assert saved_iterations(tmp_path / "checkpoints" / "mine") == [2, 4]


def test_a_length_below_the_resumed_iteration_is_refused(train: Train) -> None:
    train("ranking", output="mine", trainer={"ckpt_save_interval": 4})
    shorter = {"ckpt_save_interval": 4, "ckpt_load_dir": "auto", "max_train_iters": 3}
    with pytest.raises(ConfigError, match=r"max_train_iters: the run would end after iteration 3, but .* has done 4"):
        train("ranking", output="mine", trainer=shorter)
