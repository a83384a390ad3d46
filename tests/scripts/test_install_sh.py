"""scripts/install.sh, run in a copy of the repository with a Python that only pretends to install."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Makes .venv/bin/python a copy of itself, and notes each pip call in calls.txt. Files beside it make it fail.
FAKE_PYTHON = """#!/bin/bash
here={here}
case "$*" in
    "--version") echo "Python 3.12.9" ;;
    "-c import sys; print"*) [ -e "$here/other_python" ] && echo False || echo True ;;
    "-c import sys"*) exit $([ -e "$here/too_old" ] && echo 1 || echo 0) ;;
    "-m venv"*)
        if [ -e "$here/no_ensurepip" ]; then echo "ensurepip is not available"; exit 1; fi
        venv="${{@: -1}}"
        rm -rf "$venv"; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"; echo venv >>"$here/calls.txt" ;;
    "-m pip --version") ;;
    "-m pip install"*)
        echo "$*" >>"$here/calls.txt"
        if [ -e "$here/slow" ]; then sleep "$(cat "$here/slow")"; fi
        if [ -e "$here/pip_says" ]; then cat "$here/pip_says"; exit 1; fi ;;
    "-m hstu.ops.cpu.build") echo "compiling"; echo "CPU kernels: there" ;;
    "-c import torch"*) if [ -e "$here/broken_once" ]; then rm "$here/broken_once"; echo "ImportError: x"; exit 1; fi ;;
esac
"""


class Machine:
    """A copy of what install.sh needs, and a PATH with the pretended Python, df and nvidia-smi."""

    def __init__(self, root: Path) -> None:
        self.root = root / "repository"
        self.bin = root / "bin"
        self.bin.mkdir()
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(REPOSITORY / "pyproject.toml", self.root)
        shutil.copy(REPOSITORY / "setup.py", self.root)
        shutil.copytree(REPOSITORY / "requirements", self.root / "requirements")
        shutil.copy(REPOSITORY / "scripts" / "install.sh", self.root / "scripts")
        for name in ("python3.12", "python3.11", "python3"):
            self.command(name, FAKE_PYTHON.format(here=root))
        self.free_disk(100)
        self.command("nvidia-smi", "#!/bin/bash\nexit 9\n")
        self.command("uname", "#!/bin/bash\necho x86_64\n")
        self.here = root

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def free_disk(self, gigabytes: int) -> None:
        self.command("df", f"#!/bin/bash\necho head\necho disk 0 0 {gigabytes * 1024 * 1024} 0% /\n")

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "scripts/install.sh", *arguments],
            cwd=self.root,
            env={"PATH": f"{self.bin}:{os.defpath}:/usr/bin:/bin", "HOME": str(self.here)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def install(self, *arguments: str) -> tuple[int, str]:
        process = self.begin(*arguments)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def calls(self) -> list[str]:
        path = self.here / "calls.txt"
        calls = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return calls


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_cpu_machine_gets_the_cpu_set_with_every_file_verified(machine: Machine) -> None:
    code, output = machine.install()
    assert code == 0, output
    assert len(output.splitlines()) == 4, output  # one line a step
    assert "[set-up] CPU kernels: there\n" in output
    made, locked, torch, project = machine.calls()
    assert made == "venv"
    assert locked.endswith("--no-deps --require-hashes -r requirements/cpu.txt")
    assert torch.endswith((REPOSITORY / "requirements" / "torch.txt").read_text().strip())
    assert project.endswith("--no-deps -e .")


def test_another_python_gets_the_same_versions_and_is_told_that_no_hash_is_known(machine: Machine) -> None:
    (machine.here / "other_python").touch()
    code, output = machine.install()
    assert code == 0, output
    assert "requirements/cpu.txt has the hashes for Python 3.11 on x86_64 only" in output
    assert not any("--require-hashes" in call for call in machine.calls())
    versions = (machine.root / ".venv" / "versions.txt").read_text().splitlines()
    locked = (REPOSITORY / "requirements" / "cpu.txt").read_text()
    assert len(versions) > 60 and all(f"{version} \\\n" in locked for version in versions)


def test_a_gpu_machine_gets_the_cuda_set(machine: Machine) -> None:
    machine.command("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H100'\n")
    code, output = machine.install()
    assert code == 0, output
    assert [call.split()[-1] for call in machine.calls()] == [
        "venv",
        "requirements/cuda.txt",
        (REPOSITORY / "requirements" / "torch.txt").read_text().strip(),
        ".",
    ]


@pytest.mark.parametrize(("says", "fbgemm"), [("", "fbgemm-gpu-cpu"), ("echo 'GPU 0: NVIDIA H100'", "fbgemm-gpu")])
def test_the_oldest_set_lies_beside_the_newest(machine: Machine, says: str, fbgemm: str) -> None:
    machine.command("nvidia-smi", f"#!/bin/bash\n{says}\n")
    code, output = machine.install("oldest")
    assert code == 0, output
    _, packages, torch, project = machine.calls()
    assert packages.endswith("--no-deps -r " + str(machine.root / ".venv-oldest" / "versions.txt"))
    versions = (machine.root / ".venv-oldest" / "versions.txt").read_text().splitlines()
    assert {f"{fbgemm}==1.6.0", "torchrec==1.6.1", "triton==3.6.0"} < set(versions)
    assert torch.split()[-1] == "torch==2.11.0" and project.endswith("-e .")
    assert not (machine.root / ".venv").exists()


def test_again_does_nothing_until_a_pin_changes(machine: Machine) -> None:
    machine.install()
    machine.calls()
    assert machine.install() == (0, "")
    assert machine.calls() == []
    with (machine.root / "requirements" / "cpu.txt").open("a") as file:
        file.write("another==1.0\n")
    code, _ = machine.install()
    assert code == 0
    assert len(machine.calls()) == 3  # pip, in the same .venv


def test_without_a_new_enough_python_it_says_which_is_needed(machine: Machine) -> None:
    (machine.here / "too_old").touch()
    code, output = machine.install()
    assert code == 1
    assert "no Python 3.11 or newer found" in output
    assert not (machine.root / ".venv").exists()


def test_a_python_without_venv_names_the_package_to_install(machine: Machine) -> None:
    (machine.here / "no_ensurepip").touch()
    code, output = machine.install()
    assert code == 1
    assert "ensurepip is not available" in output
    assert "python3-venv" in output


def test_too_little_disk_is_told_before_anything_is_installed(machine: Machine) -> None:
    machine.free_disk(5)
    code, output = machine.install()
    assert code == 1
    assert "not enough disk: 5 GB free" in output
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("pip_says", "remedy"),
    [
        ("NewConnectionError: Temporary failure in name resolution", "the package index cannot be reached"),
        (
            "ERROR: Could not find a version that satisfies x (from versions: none)",
            "the package index cannot be reached",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("error: something else", "rm -rf"),
    ],
)
def test_a_failing_pip_shows_the_end_of_its_log_and_what_to_do(machine: Machine, pip_says: str, remedy: str) -> None:
    (machine.here / "pip_says").write_text("".join(f"line {i}\n" for i in range(50)) + pip_says + "\n")
    code, output = machine.install()
    assert code == 1
    assert pip_says in output
    assert "line 40\n" in output
    assert "line 10\n" not in output
    assert remedy in output

    (machine.here / "pip_says").unlink()
    assert machine.install()[0] == 0  # goes on once the cause is gone


def test_interrupted_it_stops_and_the_next_call_completes(machine: Machine) -> None:
    (machine.here / "slow").write_text("30")
    process = machine.begin()
    deadline = time.monotonic() + 30
    calls = machine.here / "calls.txt"
    while not calls.exists() or "pip install" not in calls.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130, output
    assert "run the same command again" in output
    assert "pip failed" not in output
    assert not (machine.root / ".venv" / ".installed").exists()

    (machine.here / "slow").unlink()
    assert machine.install()[0] == 0


def test_two_at_once_take_turns_and_install_once(machine: Machine) -> None:
    (machine.here / "slow").write_text("0.7")
    first, second = machine.begin(), machine.begin()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert sum("another set-up is running" in output for output in outputs) == 1
    assert len(machine.calls()) == 4  # venv, pip three times: once
