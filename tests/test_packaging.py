"""What pip installs: console commands, types and the C++ sources that are compiled on first use."""

import inspect
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement

import hstu

ROOT = Path(__file__).parents[1]


def test_every_console_command_calls_a_function_of_the_repository() -> None:
    commands = distribution("hstu-trainer").entry_points.select(group="console_scripts")
    assert {"hstu-train-ranking", "hstu-train-retrieval", "hstu-preprocess", "hstu-export"} <= commands.names
    for command in commands:
        function = command.load()
        inspect.signature(function).bind()  # no argument is required
        assert Path(inspect.getfile(getattr(function, "func", function))).is_relative_to(ROOT)


def test_metadata_and_changelog_have_a_license_and_the_version_of_the_package() -> None:
    metadata = distribution("hstu-trainer").metadata
    assert metadata["Version"] == hstu.__version__
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert f"version: {hstu.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert newest.removeprefix("## ").split(",")[0] == hstu.__version__


@pytest.mark.parametrize("locked", ["cpu", "cuda"])
def test_every_direct_dependency_is_locked_by_hash_within_its_range(locked: str) -> None:
    files = [ROOT / "requirements" / name for name in (f"{locked}.txt", f"torch_{locked}.txt")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    versions = dict(line.split(" ")[0].strip().split("==") for line in text.splitlines() if "==" in line)
    hashed = {block.split("==")[0] for block in text.split("\n") if block.endswith("\\") and "==" in block}
    requirements = [Requirement(line) for line in requires("hstu-trainer") or []]
    (of_dev,) = (requirement.extras for requirement in requirements if requirement.name == "hstu-trainer")
    extras = {locked, "dev", *of_dev}
    for requirement in requirements:
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name == "hstu-trainer":
            continue
        name = requirement.name.replace("_", "-").lower()
        assert versions[name] in requirement.specifier
        assert name in hashed


def test_the_cuda_set_has_the_libraries_of_the_cutlass_dsl_for_cuda_13() -> None:
    lines = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split(" ")[0].split("==") for line in lines if "==" in line)
    assert versions["nvidia-cutlass-dsl-libs-cu13"] == versions["nvidia-cutlass-dsl"]


COMMANDS = """
PATH={bin}:$PATH; unset PYTHONPATH
hstu-preprocess --dataset_name clicks --interactions clicks.csv --user who --item what --time when --quick
hstu-train-retrieval --gin-config-file tmp_data/clicks_retrieval_quick.gin --gin-bindings \\
    "TrainerArgs.num_train_epochs = 1" "TrainerArgs.output_dir = 'run'" "TrainerArgs.ckpt_save_dir = 'saved'"
hstu-predict --run_dir run --output predictions
hstu-train-ranking --gin-config-file examples/shop_ranking_ple --validate-only --quick
"""


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_outside_the_repository(tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    venv, source = tmp_path / "venv", tmp_path / "source"
    beside = shutil.ignore_patterns(
        ".*", "build", "docs", "exports", "runs", "tests", "tmp_data"
    )  # build has old files
    shutil.copytree(ROOT, source, ignore=beside)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    expected = {path.relative_to(ROOT) for path in (ROOT / "hstu").rglob("*") if path.is_file()}
    expected |= {Path("hstu_configs") / path.relative_to(ROOT / "configs") for path in ROOT.glob("configs/**/*.gin")}
    expected |= {Path("hstu_scripts") / path.name for path in ROOT.glob("scripts/*.py")}
    found = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {path for path in expected if path.suffix != ".pyc"}

    run(sys.executable, "-m", "venv", "--without-pip", venv)
    run(*pip, "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    # The other packages are those of the tests; pip must not see them, because there this one is installed already.
    file = Path(sysconfig.get_path("purelib", vars={"base": str(venv)})) / "tests.pth"
    file.write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    lines = [f"u{user},i{(user + step) % 9},{1000 * user + step}" for user in range(30) for step in range(6)]
    (tmp_path / "clicks.csv").write_text("\n".join(["who,what,when", *lines]))
    told = run("bash", "-ec", COMMANDS.format(bin=venv / "bin"))
    assert "hstu-train-retrieval --gin-config-file tmp_data/clicks_retrieval_quick.gin\n" in told
    assert "hstu-evaluate --run_dir run" in told and "OK: examples/shop_ranking_ple " in told
    assert pd.read_parquet(tmp_path / "predictions")["user"].nunique() == 30
