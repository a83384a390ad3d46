"""Calls inspect_checkpoint.py, export.py and recommend.py as a user does."""

import contextlib
import csv
import io
import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hstu.checkpoint.tensors import StoredTensors, load_safetensors
from hstu.config.cli import parse_time
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from scripts import export, inspect_checkpoint, recommend
from tests.conftest import write_small_store
from tests.distributed.launch import run_cases, run_ranks
from tests.helpers import flip
from tests.train.tiny import ITEMS, run, skip_measuring_the_peak, tiny_config, walks

FIRST, LAST = "iteration_00000002", "iteration_00000004"
USERS = ["a,b", 'say "hi"', "zoë ☃", " space ", "tab\tx", "x@y.example"]
"""Users whose ids need care in shells, files and CSV."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """The directory with the output, the checkpoints and the store of a run."""
    directory: Path = tmp_path_factory.mktemp("trained")
    run_cases(1, {"train": partial(train, directory=directory)})
    return directory


def train(mesh: Mesh, directory: Path) -> None:
    """Four iterations on walks of these users and of others, with checkpoints after two and four.

    And a ranking run on items whose raw ids are numbers.
    """
    skip_measuring_the_peak()
    with (directory / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "what", "did"])
        for user, row in enumerate(walks()["items"]):
            name = USERS[user] if user < len(USERS) else f"u{user}"
            writer.writerows([name, f"item, {item:02}", item % 4] for item in row)
    columns = InteractionColumns(interactions=(directory / "events.csv",), user="who", item="what", action="did")
    store = SequenceStore.open(import_interactions("walks", columns, output=directory / "store"))
    run(tiny_config("retrieval", store, directory, sharded=["what"], trainer={"ckpt_save_interval": 2}), mesh)
    numbered = write_small_store(directory / "numbered", **walks())
    run(tiny_config("ranking", numbered, directory / "ranking", trainer={"ckpt_save_interval": 4}), mesh)


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
        ["table what_table", f"{ITEMS} × 16 of what"],
        ["states of the optimizers", "--optimizer"],
        [f"{ITEMS * 16 * 4:,}", "model.tables.what_table"],
        ["operative.gin"],
    ):
        assert any(all(word in line for word in words) for line in output.splitlines()), words


def test_the_states_of_the_optimizers_are_listed_on_request(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(trained / "checkpoints"), "--optimizer"]) == 0
    words = ["float32", f"[{ITEMS}, 16]", "optimizer.tables.what_table.exp_avg"]
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


def test_an_export_has_all_that_another_tool_needs(trained: Path, exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: entry["shape"] for name, entry in config["tensors"].items()
    }
    assert config["tables"]["what_table"] == {"rows": ITEMS, "dim": 16, "features": ["what"]}
    assert tensors["ids.what.utf8"].tobytes().decode() == "".join(f"item, {item:02}" for item in range(ITEMS))
    assert all(name.startswith(("model.", "ids.")) for name in tensors)
    assert export.main(["--ckpt", str(trained / "ranking" / "checkpoints"), "--output", str(tmp_path / "ranking")]) == 0
    numbers = load_file(tmp_path / "ranking" / "model.safetensors")["ids.item_id"]
    assert numbers.tolist() == [1000 + code for code in range(ITEMS)]


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
    stored = StoredTensors(trained / "checkpoints" / LAST)
    for name, tensor in load_safetensors(exported / "model.safetensors").items():
        assert tensor.tolist() == stored.read_whole(name).tolist()


@pytest.fixture(scope="module")
def results(trained: Path, exported: Path) -> dict[str, Any]:
    """Name of a case → exit code, output and errors; ``output``: the content of --output."""
    directory, checkpoints = trained, trained / "checkpoints"
    (directory / "users.txt").write_text("\n".join([*USERS, "nobody", ""]), encoding="utf-8")
    histories = [
        {"user": "zoe", "items": ["item, 01", "item, 02"], "actions": [1, 2]},
        {"items": ["item, 07"], "actions": [3]},
    ]
    (directory / "histories.json").write_text(json.dumps(histories))
    (directory / "lines.json").write_text("\n".join(map(json.dumps, histories)))
    (directory / "wrong.json").write_text('[{"items": 1.5}]')
    (directory / "misspelt.json").write_text('[{"items": ["item, 01"], "action": [1]}]')
    model = ["--run_dir", str(directory / "run"), "--top", "3"]
    out, two = str(directory / "best.json"), ["--users", "u6,u7", "--top", "3"]
    cases = {
        "file": [*model, "--users_file", str(directory / "users.txt"), "--format", "json"],
        "written": [*model, "--users_file", str(directory / "users.txt"), "--format", "json", "--output", out],
        "unknown": [*model, "--users", "u7,nobody,no one"],
        "none known": [*model, "--users", "nobody"],
        "histories": [*model, "--histories", str(directory / "histories.json"), "--format", "json"],
        "lines": [*model, "--histories", str(directory / "lines.json"), "--format", "json"],
        "items": [*model, "--items", "nothing", "--actions", "2"],
        "no actions": [*model, "--items", "nothing"],
        "times": [*model, "--items", "item, 01", "--times", "1717000000,noon"],
        "at": [*model, "--users", "u7", "--at", "2026-01-31T18:00"],
        "at no time": [*model, "--users", "u7", "--at", "noon"],
        "wrong": [*model, "--histories", str(directory / "wrong.json")],
        "misspelt": [*model, "--histories", str(directory / "misspelt.json")],
        "no file": [*model, "--users_file", str(directory / "absent")],
        "run": [*model, *two],
        "checkpoint": ["--ckpt", str(checkpoints / LAST), *two],
        "older": ["--ckpt", str(checkpoints / FIRST), *two],
        "export": ["--ckpt", str(exported), *two],
        "ranking": ["--run_dir", str(directory / "ranking" / "run"), "--users", "100"],
        "missing": ["--ckpt", str(directory / "absent"), *two],
    }
    (found,) = run_ranks(1, recommend_from, cases)
    found["output"] = (directory / "best.json").read_text(encoding="utf-8")
    (directory / "store").rename(directory / "away")
    without_data = ["--ckpt", str(exported), "--top", "3"]
    (without,) = run_ranks(
        1,
        recommend_from,
        {
            "without data": [*without_data, "--histories", str(directory / "histories.json"), "--format", "json"],
            "users without data": [*without_data, "--users", "u7"],
        },
    )
    (directory / "away").rename(directory / "store")
    return found | without


def recommend_from(cases: dict[str, list[str]]) -> dict[str, Any]:
    """Run the script with each list of arguments; return exit codes, outputs and errors."""
    results = {}
    for name, arguments in cases.items():
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = recommend.main(arguments)
        results[name] = [code, output.getvalue(), errors.getvalue()]
    return results


def test_users_come_from_a_file_with_any_characters_in_their_ids(results: dict[str, Any]) -> None:
    code, output, errors = results["file"]
    document = json.loads(output)
    assert code == 0 and [entry["user"] for entry in document["recommendations"]] == USERS
    assert all(1 <= len(entry["items"]) <= 3 for entry in document["recommendations"])
    assert document["unknown_users"] == ["nobody"] and "1 unknown user(s) left out: 'nobody'" in errors
    assert results["written"][:2] == [0, ""] and json.loads(results["output"]) == document


def test_unknown_users_are_reported_and_the_rest_is_answered(results: dict[str, Any]) -> None:
    code, output, errors = results["unknown"]
    assert code == 0 and "user u7" in output and "nobody" not in output
    assert "2 unknown user(s) left out: 'nobody', 'no one'" in errors
    assert results["none known"][0] == 3 and "has none of these users: 'nobody'" in results["none known"][2]


def test_histories_may_be_given_by_hand(results: dict[str, Any]) -> None:
    document = json.loads(results["histories"][1])
    assert [entry["user"] for entry in document["recommendations"]] == ["zoe", 2]
    assert not {"item, 01", "item, 02"} & {item["item"] for item in document["recommendations"][0]["items"]}
    assert json.loads(results["lines"][1])["recommendations"] == document["recommendations"]
    code, output, errors = results["items"]
    assert code == 0 and output.count("item, ") == 3 and "1 unknown value(s) of what: 'nothing'" in errors


def test_an_export_answers_histories_without_the_data(results: dict[str, Any]) -> None:
    found, expected = (json.loads(results[name][1])["recommendations"] for name in ("without data", "histories"))
    assert [entry["user"] for entry in found] == [entry["user"] for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert [item["item"] for item in one["items"]] == [item["item"] for item in other["items"]]
    code, _, errors = results["users without data"]
    assert code == 3 and "no preprocessed data at" in errors


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("no actions", "has no actions, but the model reads did (integer: 0, 1, 2, 3)"),
        ("times", "--times: 'noon' is not a whole number of seconds since 1970"),
        ("at no time", "--at: 'noon' is no time; give now, seconds since 1970"),
        ("wrong", "wrong.json: history 1: items must be a list"),
        ("misspelt", "misspelt.json: history 1: action is not known; allowed: user, items, actions"),
        ("no file", "absent: No such file"),
    ],
)
def test_mistakes_are_told(results: dict[str, Any], case: str, told: str) -> None:
    code, output, errors = results[case]
    assert (code, output) == (3, "") and told in errors


def test_a_time_that_the_model_does_not_read_is_refused(results: dict[str, Any]) -> None:
    code, output, errors = results["at"]
    assert (code, output) == (2, "") and "does not read the time of a request" in errors


def test_a_time_is_now_or_seconds_or_a_date() -> None:
    assert parse_time("1769882400") == parse_time("2026-01-31T18:00") == 1_769_882_400
    assert parse_time("2026-01-31T19:00+01:00") == 1_769_882_400
    assert abs(parse_time("now") - time.time()) < 10


def test_a_run_a_checkpoint_and_an_export_recommend_the_same(results: dict[str, Any]) -> None:
    code, printed, _ = results["run"]
    assert code == 0 and "user u6" in printed and "user u7" in printed
    assert results["checkpoint"][:2] == results["export"][:2] == [0, printed]
    assert results["older"][0] == 0 and results["older"][1] != printed
    assert results["ranking"][0] == 3 and "belongs to a ranking run" in results["ranking"][2]
    assert results["missing"][0] == 3 and "no complete checkpoint" in results["missing"][2]
