"""Calls inspect_checkpoint.py, export.py and recommend.py as a user does."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hstu.checkpoint.tensors import load_safetensors, open_tensors
from hstu.parallel.mesh import Mesh
from scripts import export, inspect_checkpoint
from tests.conftest import write_small_store
from tests.distributed.launch import run_cases, run_ranks
from tests.helpers import flip
from tests.scripts.test_recommend import recommend_from
from tests.train.tiny import ITEMS, run, skip_measuring_the_peak, tiny_config, walks

FIRST, LAST = "iteration_00000002", "iteration_00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """The directory with the output, the checkpoints and the store of a run."""
    directory: Path = tmp_path_factory.mktemp("trained")
    run_cases(1, {"train": partial(train, directory=directory)})
    return directory


def train(mesh: Mesh, directory: Path) -> None:
    """Train four iterations, with checkpoints after two and after four; and a ranking run."""
    skip_measuring_the_peak()
    store = write_small_store(directory / "store", **walks())
    run(tiny_config("retrieval", store, directory, trainer={"ckpt_save_interval": 2}), mesh)
    run(tiny_config("ranking", store, directory / "ranking", trainer={"ckpt_save_interval": 4}), mesh)


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    path = trained / "exports" / "toy"
    assert export.main(["--ckpt", str(trained / "checkpoints"), "--output", str(path)]) == 0
    return path


def test_inspecting_prints_the_run_the_tensors_and_the_files(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(trained / "checkpoints")]) == 0
    output = capsys.readouterr().out
    assert f"checkpoint {trained / 'checkpoints' / LAST}" in output
    for words in (
        ["iteration", "4"],
        ["ranks", "1 in groups of 1"],
        ["table item_id_table", f"{ITEMS} × 16 of item_id"],
        ["states of the optimizers", "--optimizer"],
        [f"{ITEMS * 16 * 4:,}", "model.tables.item_id_table"],
        ["operative.gin"],
    ):
        assert any(all(word in line for word in words) for line in output.splitlines()), words


def test_the_states_of_the_optimizers_are_listed_on_request(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(trained / "checkpoints"), "--optimizer"]) == 0
    words = ["float32", f"[{ITEMS}, 16]", "optimizer.tables.item_id_table.exp_avg"]
    assert any(all(word in line for word in words) for line in capsys.readouterr().out.splitlines())


def test_verifying_names_a_flipped_byte(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = trained / "checkpoints" / LAST
    assert inspect_checkpoint.main([str(good), "--verify"]) == 0
    assert "all as written" in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged)
    file = next((damaged / "tensors").glob("*.distcp"))
    flip(file, 100)
    assert inspect_checkpoint.main([str(damaged), "--verify"]) == 3
    assert f"{file} is damaged" in capsys.readouterr().err
    assert inspect_checkpoint.main([str(tmp_path / "absent")]) == 3


def test_an_export_has_all_that_another_tool_needs(exported: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: entry["shape"] for name, entry in config["tensors"].items()
    }
    assert config["tables"]["item_id_table"] == {"rows": ITEMS, "dim": 16, "features": ["item_id"]}
    assert tensors["ids.item_id"].tolist() == [1000 + code for code in range(ITEMS)]
    assert all(name.startswith(("model.", "ids.")) for name in tensors)


def test_an_export_is_not_overwritten_and_not_made_from_a_damaged_checkpoint(
    trained: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = str(trained / "checkpoints")
    assert export.main(["--ckpt", checkpoints, "--output", str(exported)]) == 3
    assert "exists; give the name of a directory that does not exist" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "checkpoints" / LAST, damaged)
    (damaged / "operative.gin").unlink()
    assert export.main(["--ckpt", str(damaged), "--output", str(tmp_path / "out")]) == 3
    assert "operative.gin is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_averages_the_weights_are_exported(trained: Path, exported: Path) -> None:
    stored = open_tensors(trained / "checkpoints" / LAST)
    for name, tensor in load_safetensors(exported / "model.safetensors").items():
        assert tensor.tolist() == stored.read_whole(name).tolist()


def test_a_run_a_checkpoint_and_an_export_recommend_the_same(trained: Path, exported: Path) -> None:
    users = ["--users", "100,103", "--top", "3"]
    cases = {
        "run": ["--run_dir", str(trained / "run"), *users],
        "checkpoint": ["--ckpt", str(trained / "checkpoints" / LAST), *users],
        "older": ["--ckpt", str(trained / "checkpoints" / FIRST), *users],
        "export": ["--ckpt", str(exported), *users],
        "ranking": ["--run_dir", str(trained / "ranking" / "run"), *users],
        "missing": ["--ckpt", str(trained / "absent"), *users],
    }
    (results,) = run_ranks(1, recommend_from, cases)
    code, printed, _ = results["run"]
    assert code == 0 and "user 100" in printed and "user 103" in printed
    assert results["checkpoint"][:2] == results["export"][:2] == [0, printed]
    assert results["older"][0] == 0 and results["older"][1] != printed
    assert results["ranking"][0] == 3 and "belongs to a ranking run" in results["ranking"][2]
    assert results["missing"][0] == 3 and "no complete checkpoint" in results["missing"][2]
