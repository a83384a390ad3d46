import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hstu.base.errors import UserError
from hstu.observe import environment
from hstu.observe.environment import (
    STACKS,
    check_packages,
    installed_releases,
    let_idle_threads_sleep,
    missing_packages,
)

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
