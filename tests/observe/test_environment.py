import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu.base.errors import UserError
from hstu.observe import environment
from hstu.observe.environment import PACKAGES, check_packages, let_idle_threads_sleep, missing_packages

REPOSITORY = Path(__file__).resolve().parents[2]


def test_here_everything_is_installed() -> None:
    assert missing_packages() == []
    check_packages()


def test_a_missing_package_names_the_command_to_run() -> None:
    with pytest.raises(UserError, match=r"Missing packages: no_such_package\. .*scripts/install\.sh"):
        check_packages(["torch", "no_such_package"])


@pytest.mark.parametrize(("torch", "release"), [("2.11.0+cu130", "1.6"), ("2.12.1", "1.7"), ("2.13.0+cpu", "1.8")])
def test_missing_torchrec_tells_the_cpu_and_the_cuda_way_with_the_releases_for_the_torch_that_is_there(
    monkeypatch: pytest.MonkeyPatch, torch: str, release: str
) -> None:
    monkeypatch.setattr(environment.util, "find_spec", lambda name: None if name in ("torchrec", "fbgemm_gpu") else 1)
    monkeypatch.setattr(environment, "installed_releases", lambda: {"torch": torch})
    with pytest.raises(UserError) as error:
        check_packages()
    assert "Missing packages: fbgemm-gpu, torchrec." in str(error.value)
    assert f"pip install -e '.[cuda]' 'torchrec=={release}.*' 'fbgemm-gpu=={release}.*'" in str(error.value)
    cpu = f"pip install 'fbgemm-gpu-cpu=={release}.*' && pip install --no-deps 'torchrec=={release}.*'"
    assert cpu in str(error.value)


def test_checking_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from hstu.observe.environment import check_packages\n"
        "check_packages()\n"
        f"print([name for name in {list(PACKAGES)} if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_idle_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    let_idle_threads_sleep()
    assert os.environ == {"OMP_WAIT_POLICY": "passive"}
    monkeypatch.setattr("os.environ", {"OMP_WAIT_POLICY": "active"})
    let_idle_threads_sleep()
    assert os.environ == {"OMP_WAIT_POLICY": "active"}


def test_a_number_of_spins_that_the_user_gives_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"GOMP_SPINCOUNT": "1000"})
    let_idle_threads_sleep()
    assert os.environ == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_a_training_script_says_so_before_openmp_is_loaded(task: str) -> None:
    code = f"""
import sys, pretrain_gr_{task} as script
def seen(*_, **__):
    assert "torch" not in sys.modules
    print("before torch")
script.parse_command_line, script.let_idle_threads_sleep = lambda *_, **__: None, seen
sys.modules["hstu.train.main"] = type(sys)("main")
sys.modules["hstu.train.main"].run = lambda config: 0
script.main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout == "before torch\n", result.stderr
