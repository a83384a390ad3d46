"""scripts/install.sh, run in a copy of the repository with a Python that only pretends to install."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.helpers import begin_script
from tests.serve.http_server import until

# Makes .venv/bin/python a copy of itself, and notes each pip call in calls.txt. Files beside it make it fail.
FAKE_PYTHON = """#!/bin/bash
here={here}
case "$*" in
    "--version") echo "Python 3.12.9" ;;
    "-c import sys"*) exit $([ -e "$here/too_old" ] && echo 1 || echo 0) ;;
    "-m venv"*)
        if [ -e "$here/no_ensurepip" ]; then echo "ensurepip is not available"; exit 1; fi
        venv="${{@: -1}}"
        mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"; echo venv >>"$here/calls.txt" ;;
    "-m pip --version") ;;
    "-m pip install"*)
        echo "$*" >>"$here/calls.txt"
        if [ -e "$here/slow" ]; then sleep "$(cat "$here/slow")"; fi
        if [ -e "$here/only_pypi" ] && [[ $* == *torch_cpu* ]]; then exit 1; fi
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
        for name in ("python3.12", "python3.11", "python3.13", "python3"):
            self.command(name, FAKE_PYTHON.format(here=root))
        self.free_disk(100)
        self.command("nvidia-smi", "#!/bin/bash\nexit 9\n")
        self.here = root

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def free_disk(self, gigabytes: int) -> None:
        self.command("df", f"#!/bin/bash\necho head\necho disk 0 0 {gigabytes * 1024 * 1024} 0% /\n")

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.bin}:{os.defpath}:/usr/bin:/bin", "HOME": str(self.here)}
        return begin_script(Path("scripts/install.sh"), *arguments, cwd=self.root, env=env)

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


CHECKED = "--no-deps --require-hashes --no-build-isolation -r requirements/"


@pytest.mark.parametrize(
    ("situation", "files"),
    [
        ("pytorch_index", ["torch_cpu.txt", "cpu.txt"]),
        ("only_pypi", ["torch_cpu.txt", "torch_cuda.txt", "cpu.txt"]),
        ("gpu", ["torch_cuda.txt", "cuda.txt"]),
    ],
)
def test_every_file_of_every_set_is_checked_by_its_hash(machine: Machine, situation: str, files: list[str]) -> None:
    (machine.here / situation).touch()
    if situation == "gpu":
        machine.command("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H100'\n")
    code, output = machine.install()
    assert code == 0, output
    assert ("[set-up] CPU kernels: there\n" in output) == (situation != "gpu")
    made, *packages, project = machine.calls()
    assert made == "venv"
    assert [call.partition(CHECKED)[2] for call in packages] == files
    assert project.endswith("--no-deps --no-build-isolation -e .")


@pytest.mark.parametrize("name", ["cpu", "cuda", "torch_cpu", "torch_cuda"])
def test_the_lock_has_one_version_per_package_for_every_python_and_the_hashes_of_all_its_files(name: str) -> None:
    entries = (REPOSITORY / "requirements" / f"{name}.txt").read_text().replace("\\\n", "").splitlines()
    packages = [entry.split("==")[0] for entry in entries]
    assert len(set(packages)) == len(packages)
    assert all("--hash=sha256:" in entry for entry in entries)
    if name == "cpu":
        numpy = next(entry for entry in entries if entry.startswith("numpy=="))
        assert ";" not in numpy and numpy.count("--hash") > 40  # Python 3.11 to 3.14, each on several machines


@pytest.mark.parametrize("kind", ["link", "no_pip", "packages_do_not_import"])
def test_a_directory_that_it_did_not_make_is_never_emptied(machine: Machine, kind: str) -> None:
    venv = machine.root / ".venv"
    place = machine.here / "shared_environment" if kind == "link" else venv
    place.mkdir()
    (place / "mine.txt").write_text("precious")
    if kind == "link":
        venv.symlink_to(place)
    if kind == "packages_do_not_import":
        (venv / "bin").mkdir()
        shutil.copy(machine.bin / "python3", venv / "bin" / "python")
        (machine.here / "broken_once").touch()
    code, output = machine.install()
    assert code == 1
    assert "this script did not make it" in output and f"rm -rf {venv}" in output
    assert (place / "mine.txt").read_text() == "precious"
    assert "venv" not in machine.calls()


def test_packages_that_do_not_import_are_installed_from_nothing_once_more(machine: Machine) -> None:
    (machine.here / "broken_once").touch()
    code, output = machine.install()
    assert code == 0, output
    assert machine.calls().count("venv") == 2


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


@pytest.mark.parametrize(
    ("situation", "told"),
    [
        ("too_old", ["no Python 3.11 or newer found"]),
        ("no_ensurepip", ["ensurepip is not available", "python3-venv"]),
        ("little_disk", ["not enough disk: 5 GB free"]),
    ],
)
def test_what_the_machine_lacks_is_told_before_anything_is_installed(
    machine: Machine, situation: str, told: list[str]
) -> None:
    (machine.here / situation).touch()
    if situation == "little_disk":
        machine.free_disk(5)
    code, output = machine.install()
    assert code == 1 and all(part in output for part in told)
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
    calls = machine.here / "calls.txt"
    until(lambda: calls.exists() and "pip install" in calls.read_text())
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
