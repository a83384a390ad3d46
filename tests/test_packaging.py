"""What pip installs: console commands, types and the C++ sources that are compiled on first use."""

import inspect
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hstu

ROOT = Path(__file__).parents[1]


def test_every_console_command_calls_a_function_of_the_repository() -> None:
    commands = {entry.name: entry for entry in distribution("hstu").entry_points if entry.group == "console_scripts"}
    assert {"hstu-train-ranking", "hstu-train-retrieval", "hstu-preprocess", "hstu-export"} <= commands.keys()
    for command in commands.values():
        function = command.load()
        required = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is inspect.Parameter.empty
        ]
        assert not required, f"{command.name} calls {command.value}, which has the required arguments {required}"
        assert Path(inspect.getfile(getattr(function, "func", function))).is_relative_to(ROOT)


def test_the_metadata_has_a_license_and_the_version_of_the_package() -> None:
    metadata = distribution("hstu").metadata
    assert metadata["Version"] == hstu.__version__
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert f"version: {hstu.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_newest_part_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert newest.removeprefix("## ").split(",")[0] == hstu.__version__


@pytest.mark.parametrize("locked", ["cpu", "cuda"])
def test_every_direct_dependency_is_locked_by_hash_within_its_range(locked: str) -> None:
    files = [ROOT / "requirements" / name for name in (f"{locked}.txt", f"torch_{locked}.txt")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    versions = dict(line.split(" ")[0].strip().split("==") for line in text.splitlines() if "==" in line)
    hashed = {block.split("==")[0] for block in text.split("\n") if block.endswith("\\") and "==" in block}
    for line in requires("hstu") or []:
        requirement = Requirement(line)
        extras = {locked, "dev", "serve", "kafka"}  # dev has the last two
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name == "hstu":
            assert requirement.extras == {"serve", "kafka"}
            continue
        name = requirement.name.replace("_", "-").lower()
        assert versions[name] in requirement.specifier
        assert name in hashed


def test_the_cuda_set_has_the_libraries_of_the_cutlass_dsl_for_cuda_13() -> None:
    lines = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split(" ")[0].split("==") for line in lines if "==" in line)
    assert versions["nvidia-cutlass-dsl-libs-cu13"] == versions["nvidia-cutlass-dsl"]
