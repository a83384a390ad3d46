import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu.config.errors import UserError
from hstu.observe import environment
from hstu.observe.environment import PACKAGES, check_packages, let_idle_threads_sleep, missing_packages

REPOSITORY = Path(__file__).resolve().parents[2]


def test_here_everything_is_installed() -> None:
    assert missing_packages() == []
    check_packages()


def test_a_missing_package_names_the_command_to_run() -> None:
    with pytest.raises(UserError, match=r"Missing packages: no_such_package\. .*scripts/install\.sh"):
        check_packages(["torch", "no_such_package"])


def test_missing_torchrec_tells_the_cpu_and_the_cuda_way_with_the_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment.util, "find_spec", lambda name: None if name in ("torchrec", "fbgemm_gpu") else 1)
    requires = ["torch<2.14,>=2.13", 'fbgemm-gpu-cpu<1.9,>=1.8; extra == "cpu"', 'torchrec<1.9,>=1.8 ; extra == "cuda"']
    monkeypatch.setattr(environment.metadata, "requires", lambda name: requires)
    with pytest.raises(UserError) as error:
        check_packages()
    assert "Missing packages: fbgemm-gpu, torchrec." in str(error.value)
    assert "pip install -e '.[cuda]'" in str(error.value)
    assert "pip install 'fbgemm-gpu-cpu<1.9,>=1.8' && pip install --no-deps 'torchrec<1.9,>=1.8'" in str(error.value)


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
