"""The rooms of the house import in one direction only, and the package itself is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from itself and from rooms on an earlier line.
LEVELS = (
    ("config",),
    ("data",),
    ("ops",),
    ("model",),
    ("parallel",),
    ("optim",),
    ("pipeline",),
    ("checkpoint", "observe"),
    ("train",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = sorted((ROOT / "hstu").glob("*/**/*.py"))


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("hstu.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_earlier_rooms(path):
    room = path.relative_to(ROOT / "hstu").parts[0]
    later = {other for other in imported_rooms(path) if other != room and LEVEL_OF[other] >= LEVEL_OF[room]}
    assert not later, f"{path} imports from {later}"


def test_importing_the_package_needs_neither_gpu_nor_triton_nor_torch():
    code = "import hstu, sys; print({'torch', 'triton', 'torchrec'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "set()"
