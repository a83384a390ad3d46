"""What pip installs: console commands, types and the C++ sources that are compiled on first use."""

import inspect
from importlib.metadata import distribution
from pathlib import Path

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
        assert Path(inspect.getfile(function)).is_relative_to(ROOT)


def test_the_metadata_has_a_license_and_the_version_of_the_package() -> None:
    metadata = distribution("hstu").metadata
    assert metadata["Version"] == hstu.__version__
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert f"version: {hstu.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
