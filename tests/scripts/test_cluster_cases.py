"""The simulated clusters of docs/benchmarks/cluster."""

import json
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

PUBLISHED = REPOSITORY / "docs/benchmarks/cluster"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    yield import_module("cluster_cases")


def test_published_numbers_are_those_of_the_commands_beside_them(cases: Any) -> None:
    for group, of_group in cases.CASES.items():
        report = json.loads((PUBLISHED / f"{group}.json").read_text())
        assert list(report) == list(of_group)
        for name, arguments in of_group.items():
            assert shlex.split(report[name]["command"])[2:] == arguments
            sizes = cases.script.parse(arguments).simulate
            assert sizes == [each["gpus"] for each in report[name]["clusters"]]


def test_a_case_is_simulated_shown_and_drawn(cases: Any, tmp_path: Path) -> None:
    report = {"small": cases.simulate(cases.case(cases.UNEVEN, *cases.ROWS, sizes=("8",)))}
    head, _, row = cases.table(report).splitlines()
    assert head.count("|") == row.count("|") and row.startswith("| small | 8 | ")
    image = tmp_path / "computing.png"
    cases.draw({"lengths": report, "trillion": report}, image)
    assert image.read_bytes().startswith(b"\x89PNG")
