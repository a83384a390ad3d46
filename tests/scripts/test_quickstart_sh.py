"""scripts/quickstart.sh with a Python that only notes what it was asked: what runs, and what is not run again."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.serve.http_server import until

FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *SequenceStore*) [ -e tmp_data/ml-100k ] ;;
    *preprocess_dataset.py*) echo preprocess >>calls.txt; mkdir -p tmp_data/ml-100k ;;
    *pretrain_gr_retrieval.py*)
        echo train >>calls.txt
        echo "$*" >command.txt
        if [ -e slow ]; then sleep 30; fi
        if [ -e fail ]; then exit 3; fi
        mkdir -p runs/quickstart
        echo "{\\"status\\": \\"$(cat status)\\"}" >runs/quickstart/summary.json ;;
    *quickstart_report.py*) echo report >>calls.txt; echo "HR@10 0.1" ;;
esac
"""


class Machine:
    """A repository in which everything but quickstart.sh is pretended."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for directory in ("scripts", ".venv/bin", "configs"):
            (root / directory).mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "quickstart.sh", root / "scripts")
        (root / "configs" / "ml_100k_retrieval.gin").write_text("TrainerArgs.seed = 1\n")
        (root / "status").write_text("done")
        for path, text in (("scripts/install.sh", "#!/bin/bash\n"), (".venv/bin/python", FAKE_PYTHON)):
            (root / path).write_text(text)
            (root / path).chmod(0o755)

    def begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "scripts" / "quickstart.sh")],
            cwd="/",
            env={"PATH": os.defpath + ":/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def quickstart(self) -> tuple[int, str, list[str]]:
        """Exit code, output, and what was run."""
        calls = self.root / "calls.txt"
        calls.unlink(missing_ok=True)
        process = self.begin()
        output = process.communicate(timeout=60)[0]
        return process.returncode, output, calls.read_text().split() if calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_from_nothing_it_preprocesses_trains_and_reports(machine: Machine) -> None:
    code, output, calls = machine.quickstart()
    assert code == 0, output
    assert calls == ["preprocess", "train", "report"]
    assert [line.split()[0] for line in output.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]", "HR@10"]
    command = (machine.root / "command.txt").read_text()
    assert "--gin-config-file configs/ml_100k_retrieval.gin" in command
    assert "TrainerArgs.output_dir = 'runs/quickstart'" in command


def test_again_it_only_reports(machine: Machine) -> None:
    machine.quickstart()
    code, output, calls = machine.quickstart()
    assert (code, calls) == (0, ["report"])
    assert "done before" in output


def test_a_changed_configuration_is_trained_anew(machine: Machine) -> None:
    machine.quickstart()
    (machine.root / "configs" / "ml_100k_retrieval.gin").write_text("TrainerArgs.seed = 2\n")
    assert machine.quickstart()[2] == ["train", "report"]


def test_a_training_that_was_stopped_is_not_taken_for_done(machine: Machine) -> None:
    (machine.root / "status").write_text("stopped")
    machine.quickstart()
    (machine.root / "status").write_text("done")
    assert machine.quickstart()[2] == ["train", "report"]


def test_a_failure_says_which_step_and_keeps_its_exit_code(machine: Machine) -> None:
    (machine.root / "fail").touch()
    code, output, calls = machine.quickstart()
    assert (code, calls) == (3, ["preprocess", "train"])
    assert "failed at: training (exit code 3)" in output


def test_interrupted_it_says_so_and_goes_on_when_run_again(machine: Machine) -> None:
    (machine.root / "slow").touch()
    process = machine.begin()
    until((machine.root / "command.txt").exists)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130, output
    assert "interrupted during: training" in output

    (machine.root / "slow").unlink()
    code, _, calls = machine.quickstart()
    assert (code, calls) == (0, ["train", "report"])
