"""Kernels that were compiled ahead are found by a launch on another machine, which compiles nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

import kernel_variants
from kernel_variants import record, variants

import hstu
from hstu.ops.compile_ahead import Job, compile_all, strip_triton_cache
from hstu.ops.kernels import KernelShapes
from hstu.ops.triton.compile_ahead import jobs, jobs_of

VARIANTS = ("add_positions 0 [T, 1024], float32", "activate 256 2 × 4 × 256, bfloat16")
LAUNCHES = """
import sys
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from kernel_variants import variants

launched = []
class Driver:
    utils = SimpleNamespace(
        load_binary=lambda name, code, shared, device: ("module", code[:4], 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def launcher_cls(self, source, metadata):
        return lambda x, y, z, stream, function, *_: launched.append((source.name, function))

def compile_now(source, *_): raise AssertionError(f"{source.name} is not in the cache")

triton.runtime.driver.set_active(Driver())
triton.compiler.ASTSource.make_ir = compile_now
for variant in variants():
    if f"{variant.op} {variant.head_dim} {variant.description}" in sys.argv[1:]:
        variant.run()
assert all(function == b"\\x7fELF" for _, function in launched)
print(*sorted({name for name, _ in launched}))
"""
"""Launches through Triton's own launch path with the driver of a GPU that does nothing."""


def launch_elsewhere(folder: Path) -> subprocess.CompletedProcess[str]:
    """Launch the variants in a new process that finds the project and the cache in ``folder``."""
    environment = os.environ | {
        "PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONHASHSEED": "7"
    }  # fmt: skip
    command = [sys.executable, "-c", LAUNCHES, *VARIANTS]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_a_launch_finds_a_copied_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    of_variants = [
        job
        for variant in variants()
        if f"{variant.op} {variant.head_dim} {variant.description}" in VARIANTS
        for job in jobs_of(record(variant, 90), 90)
    ]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    next(job for job in of_variants if job.name.startswith("silu_kernel")).compile()  # this process has filled another
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here))
    results = list(compile_all(of_variants, processes=2))
    assert len(results) == len(of_variants) and not any(result.error for result in results)
    strip_triton_cache(here)
    assert {file.suffix for file in here.glob("*/*")} == {".cubin", ".json"}

    shutil.copytree(hstu.__path__[0], there / "hstu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(kernel_variants.__file__, there)
    shutil.move(here, there / "triton")
    missing = launch_elsewhere(there)
    assert "is not in the cache" in missing.stderr, "paths are adopted first"
    strip_triton_cache(there / "triton")
    done = launch_elsewhere(there)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["add_table_rows", "silu_kernel", "sum_runs"]


def test_the_gradient_of_a_bias_compiles_for_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shapes = KernelShapes(16, 2, 32, 16, torch.bfloat16, has_bias=True)
    of_bias = [job for job in jobs(shapes, 90, ["attention"]) if job.name.startswith("attention_backward_bias")]
    assert of_bias and not any(result.error for result in compile_all(of_bias, processes=2))


def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_compiled() -> None:
    def fail() -> None:
        raise ValueError("no such instruction\nin line 7")

    results = {each.name: each.error for each in compile_all([Job("bad", fail), Job("good", lambda: None)], 2)}
    assert results == {"bad": "ValueError: no such instruction", "good": None}
    assert list(compile_all([], 2)) == []


def test_after_a_compiler_has_killed_its_process_the_jobs_that_are_left_fail() -> None:
    results = list(compile_all([Job("killed", lambda: os._exit(3))], 2))
    assert [(each.name, "killed its process" in str(each.error)) for each in results] == [("killed", True)]
