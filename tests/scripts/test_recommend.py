"""Calls scripts/recommend.py as a user does: users from files, histories given by hand, and JSON."""

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

from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.command import parse_time
from scripts import recommend
from tests.distributed.launch import run_cases, run_ranks
from tests.train.tiny import run, skip_measuring_the_peak, tiny_config, walks

USERS = ["a,b", 'say "hi"', "zoë ☃", " space ", "tab\tx", "x@y.example"]
"""Users whose ids need care in shells, files and CSV."""


def train(mesh: Mesh, directory: Path) -> None:
    """A retrieval run on walks of these users and of others."""
    skip_measuring_the_peak()
    with (directory / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "what", "did"])
        for user, row in enumerate(walks()["items"]):
            name = USERS[user] if user < len(USERS) else f"u{user}"
            writer.writerows([name, f"item, {item}", item % 4] for item in row)
    columns = InteractionColumns(interactions=(directory / "events.csv",), user="who", item="what", action="did")
    store = SequenceStore.open(import_interactions("walks", columns, output=directory / "store"))
    run(tiny_config("retrieval", store, directory, sharded=["what"], trainer={"ckpt_save_interval": 4}), mesh)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name of a case → exit code, output and errors; ``written``: the content of --output."""
    directory = tmp_path_factory.mktemp("trained")
    run_cases(1, {"train": partial(train, directory=directory)})
    exported = export(locate(directory / "run"), directory / "exported")
    (directory / "users.txt").write_text("\n".join([*USERS, "nobody", ""]), encoding="utf-8")
    histories = [
        {"user": "zoe", "items": ["item, 1", "item, 2"], "actions": [1, 2]},
        {"items": ["item, 7"], "actions": [3]},
    ]
    (directory / "histories.json").write_text(json.dumps(histories))
    (directory / "lines.json").write_text("\n".join(map(json.dumps, histories)))
    (directory / "wrong.json").write_text('[{"items": 1.5}]')
    (directory / "misspelt.json").write_text('[{"items": ["item, 1"], "action": [1]}]')
    model = ["--run_dir", str(directory / "run"), "--top", "3"]
    out = str(directory / "best.json")
    cases = {
        "file": [*model, "--users_file", str(directory / "users.txt"), "--format", "json"],
        "written": [*model, "--users_file", str(directory / "users.txt"), "--format", "json", "--output", out],
        "unknown": [*model, "--users", "u7,nobody,no one"],
        "none known": [*model, "--users", "nobody"],
        "histories": [*model, "--histories", str(directory / "histories.json"), "--format", "json"],
        "lines": [*model, "--histories", str(directory / "lines.json"), "--format", "json"],
        "items": [*model, "--items", "nothing", "--actions", "2"],
        "no actions": [*model, "--items", "nothing"],
        "times": [*model, "--items", "item, 1", "--times", "1717000000,noon"],
        "at": [*model, "--users", "u7", "--at", "2026-01-31T18:00"],
        "at no time": [*model, "--users", "u7", "--at", "noon"],
        "wrong": [*model, "--histories", str(directory / "wrong.json")],
        "misspelt": [*model, "--histories", str(directory / "misspelt.json")],
        "no file": [*model, "--users_file", str(directory / "absent")],
    }
    (found,) = run_ranks(1, recommend_from, cases)
    found["output"] = (directory / "best.json").read_text(encoding="utf-8")
    shutil.rmtree(directory / "store")
    without_data = ["--ckpt", str(exported), "--top", "3"]
    (without,) = run_ranks(
        1,
        recommend_from,
        {
            "without data": [*without_data, "--histories", str(directory / "histories.json"), "--format", "json"],
            "users without data": [*without_data, "--users", "u7"],
        },
    )
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
    assert not {"item, 1", "item, 2"} & {item["item"] for item in document["recommendations"][0]["items"]}
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
