"""What the structure of the package promises: imports go one way, and the package itself is light."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from itself and from rooms on an earlier line. api.py and entry.py are the only modules beside them.
LEVELS = (
    ("base",),
    ("config",),
    ("data",),
    ("ops",),
    ("model",),
    ("parallel",),
    ("optim",),
    ("pipeline",),
    ("checkpoint", "observe"),
    ("train",),
    ("estimate", "serve", "stream", "sweep"),
    ("api",),
    ("entry",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
IMPORTS_WHEN_CALLED = {
    "hstu.ops.select",  # a backend is imported once it is chosen
    "hstu.entry",  # a bad file is refused before torch is imported
    "hstu.train.main",  # and a bad set of packages before they are imported
    "hstu.data.preprocess.build",  # only running statistics need torch, which takes longer to import than many appends
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((ROOT / "hstu").rglob("*.py"))}


def imported(tree: ast.AST) -> set[str]:
    """The modules of the project that are imported anywhere in the tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & MODULES.keys() or {node.module}
    return names & MODULES.keys()


@cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


@cache
def imports() -> dict[str, set[str]]:
    """Module → the modules that it imports."""
    return {name: imported(tree) - {name, "hstu"} for name, tree in trees().items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_a_module_imports_only_from_its_own_and_earlier_rooms() -> None:
    for module in MODULES.keys() - {"hstu"}:
        room = room_of(module)
        others = {other for other in imports()[module] if room_of(other) != room}
        later = {other for other in others if LEVEL_OF[room_of(other)] >= LEVEL_OF[room]}
        assert not later, f"{module} imports {later}"


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' → '.join(reversed(error.args[1]))}")


def test_functions_do_not_import_modules_of_the_project() -> None:
    for module in MODULES.keys() - IMPORTS_WHEN_CALLED:
        functions = (node for node in ast.walk(trees()[module]) if isinstance(node, ast.FunctionDef))
        inner = {function.name: imported(function) for function in functions if imported(function)}
        assert not inner, f"functions of {module} import {inner}"


def test_a_circle_and_an_import_in_a_function_would_be_noticed() -> None:
    source = "def function():\n    from hstu.data.batches import batch, jagged\n    import hstu.ops.select"
    assert imported(ast.parse(source)) == {
        "hstu.data.batches.batch",
        "hstu.data.batches.jagged",
        "hstu.ops.select",
    }
    assert "hstu.data.store.sequence_store" in imports()["hstu.data.sampling.samples"]
    assert "hstu.config.run_config" in imports()["hstu.train.main"]


@pytest.mark.parametrize(("module", "left"), [("hstu", "torch triton torchrec"), ("hstu.train.main", "duckdb")])
def test_an_import_leaves_large_packages_that_it_does_not_need(module: str, left: str) -> None:
    code = f"import {module}, sys; print(set({left!r}.split()) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "set()"
