"""Releases of torch, TorchRec and FBGEMM that are not tested together give a warning."""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hstu.observe.releases import STACKS, installed_releases, release_warning
from hstu.train import main

README = Path(__file__).resolve().parents[2] / "README.md"
MIXED = {"torch": "2.11.0+cu130", "torchrec": "1.8.0", "fbgemm-gpu": "1.6.0"}


def test_releases_that_do_not_belong_together_are_told_in_one_line() -> None:
    assert release_warning(MIXED) == (
        "torch 2.11.0+cu130, torchrec 1.8.0 and fbgemm-gpu 1.6.0 are installed; this trainer is tested with torch "
        "2.13, torchrec 1.8 and fbgemm-gpu 1.8, or torch 2.12, torchrec 1.7 and fbgemm-gpu 1.7, or torch 2.11, "
        "torchrec 1.6 and fbgemm-gpu 1.6. To install them: scripts/install.sh"
    )
    assert release_warning({**STACKS[0], "torch": "2.14.0"}) is not None


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: f"torch {stack['torch']}")
def test_each_tested_stack_is_in_setups_ranges_and_the_readme(stack: dict[str, str]) -> None:
    assert release_warning({**stack, "torch": f"{stack['torch']}.1+cpu"}) is None
    required = {each.name: each.specifier for each in map(Requirement, requires("hstu") or [])}
    for package, release in stack.items():
        assert f"{release}.0" in required[package]
    assert f"| {' | '.join(stack.values())} |" in README.read_text(encoding="utf-8")


def test_the_tests_run_with_one_of_the_stacks() -> None:
    assert installed_releases().keys() == STACKS[0].keys()
    assert release_warning(installed_releases()) is None


def test_a_run_warns_of_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(main, "installed_releases", lambda: MIXED)
    main.check_releases()
    assert capsys.readouterr().err.startswith("warning: torch 2.11.0+cu130, torchrec 1.8.0 and")
