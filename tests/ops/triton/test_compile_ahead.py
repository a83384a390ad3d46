"""Kernels compile without a GPU and fit its shared memory; on sm_80 and sm_90 none spills up to head dim 128.

Those that were compiled ahead are found by a launch on another machine, which compiles nothing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.ops.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

import kernel_variants
from kernel_variants import Compiled, Variant, compile_launch, record, variants

import hstu
from hstu.ops.compile_ahead import Job, compile_all, num_cores, strip_triton_cache
from hstu.ops.kernels import KernelShapes
from hstu.ops.triton.compile_ahead import jobs, jobs_of

DOCS = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "kernels"
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory of a program, by compute capability."""
HEAD_DIM_WITHOUT_SPILLS = 128
MOST_SPILLS = {80: 0, 89: 16, 90: 0, 100: 64}
"""Up to HEAD_DIM_WITHOUT_SPILLS. The tiles were not chosen for sm_89 and sm_100, where attention spills a little."""
ON_TENSOR_CORES = ("attention_forward", "linear_silu")
VARIANTS = {f"{v.op} {v.head_dim} {v.description}": v for v in variants()}
MAIN = {
    "hstu_attention 128 causal, bfloat16": 90,
    "hstu_attention 64 causal, bias, bfloat16": 80,
    "add_layer_norm 0 [T, 1024], float32 residual, bfloat16 update": 80,
    "norm_mul_dropout 64 2 heads, heads on 2 ranks": 90,
    "uvqk 256 1024 → 2 × 4 × 256, bfloat16": 90,
    "activate 256 2 × 4 × 256, bfloat16": 80,
    "jagged_concat 0 [T, 1024], float32": 80,
    "add_positions 0 [T, 1024], float32": 90,
    "sampled_softmax_loss 0 [M, 64], float32, seen items masked": 90,
    "slots 0 of dynamic tables": 90,
}


def check(variant: Variant, capability: int) -> list[Compiled]:
    built = [compile_launch(launch, launch.configs[0], capability) for launch in record(variant, capability)]
    for compiled in built:
        assert compiled.instructions > 50 and 0 < compiled.registers <= 255
        assert compiled.shared_bytes <= SHARED_BYTES[capability], compiled
        if variant.head_dim <= HEAD_DIM_WITHOUT_SPILLS:
            assert compiled.spill_instructions <= MOST_SPILLS[capability], compiled
        if compiled.kernel in ON_TENSOR_CORES:
            assert compiled.wgmma or compiled.mma or compiled.tensor_memory_mma, compiled
    assert built
    return built


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_the_table_in_the_docs_has_every_variant_and_all_of_them_fit(capability: int) -> None:
    rows = [row for row in json.loads((DOCS / "triton.json").read_text()) if row["capability"] == capability]
    listed = {(row["op"], row["head_dim"], row["variant"]) for row in rows}
    assert listed == {(v.op, v.head_dim, v.description) for v in VARIANTS.values()}
    assert max(row["shared_bytes"] for row in rows) <= SHARED_BYTES[capability]
    narrow = [row["spill_instructions"] for row in rows if row["head_dim"] <= HEAD_DIM_WITHOUT_SPILLS]
    assert max(narrow) <= MOST_SPILLS[capability]


@pytest.mark.parametrize("name", MAIN)
def test_the_main_kernels_compile_without_spilling(name: str) -> None:
    built = check(VARIANTS[name], MAIN[name])
    if name == "hstu_attention 128 causal, bfloat16":
        assert [kernel.kernel for kernel in built] == [
            "attention_forward",
            "attention_backward_keys",
            "attention_backward_queries",
        ]
        assert all(kernel.wgmma and not kernel.mma for kernel in built), "products are computed by warp groups"


def test_a_small_kernel_compiles_for_every_gpu() -> None:
    for capability in SHARED_BYTES:
        check(VARIANTS["activate 256 2 × 4 × 256, bfloat16"], capability)


def test_main_variants_launch_every_kernel_that_any_variant_does() -> None:
    def kernels(names: Iterable[str]) -> set[str]:
        return {launch.kernel.fn.__name__ for name in names for launch in record(VARIANTS[name], 90)}

    assert kernels(MAIN) == kernels(VARIANTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_variant_compiles_as_a_launch_runs_it(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = [launch for variant in VARIANTS.values() for launch in record(variant, capability)]
    results = list(compile_all(jobs_of(launches, capability), num_cores()))
    assert len(results) > 100 and not [result for result in results if result.error]


# --- compiled here, launched elsewhere ---

CACHED = ("add_positions 0 [T, 1024], float32", "activate 256 2 × 4 × 256, bfloat16")
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
    command = [sys.executable, "-c", LAUNCHES, *CACHED]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_a_launch_finds_a_copied_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    of_variants = [
        job
        for variant in variants()
        if f"{variant.op} {variant.head_dim} {variant.description}" in CACHED
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
