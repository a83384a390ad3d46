"""Compiling the C++ kernels: once a machine, whoever else is at it, and a clear line where it cannot be."""

import ctypes
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hstu.base.files import cache_directory
from hstu.ops.cpu import build

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, build.COMPILERS)), reason="NEEDS A C++ COMPILER: none is found"
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sources


def test_what_is_compiled_is_found_again_until_a_source_changes(small_sources: Path) -> None:
    first = build.library_file()
    made = first.stat().st_mtime_ns
    assert build.library_file() == first and first.stat().st_mtime_ns == made
    (small_sources / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert build.library_file() != first


@pytest.mark.parametrize("planted", ["writable by all", "of another user"])
def test_a_library_that_another_user_could_write_is_compiled_again(small_sources: Path, planted: str) -> None:
    library = build.library_file()
    library.write_bytes(b"code of somebody else")
    plant(library, planted)
    assert build.library_file() == library
    assert ctypes.CDLL(str(library)).one() == 1
    assert library.stat().st_uid == os.geteuid() and not library.stat().st_mode & 0o022


@pytest.mark.parametrize("taken", ["writable by all", "of another user"])
def test_no_other_user_can_write_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    (tmp_path / "hstu").mkdir()
    plant(tmp_path / "hstu", taken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / f"hstu-{os.geteuid()}"
    assert not cache_directory().stat().st_mode & 0o022


def plant(path: Path, how: str) -> None:
    if how == "writable by all":
        path.chmod(0o777)
    elif os.geteuid() != 0:
        pytest.skip("NEEDS ROOT: gives a file to another user")
    else:
        os.chown(path, 65534, -1)


def test_without_a_home_directory_there_are_no_kernels_and_the_reason_is_given(
    small_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(build.KernelsUnavailable, match="no home directory; set HOME or XDG_CACHE_HOME"):
        build.library_file()


def test_processes_that_start_together_compile_once(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")  # a process that has to import torch takes seconds
    together, compilations, compile_now = fork.Barrier(4), tmp_path / "compilations", build._compile

    def counted(compiler: str, library: Path) -> None:
        with compilations.open("a") as file:
            file.write(f"{library}\n")
        compile_now(compiler, library)

    def compile_together() -> None:
        together.wait(timeout=60)
        build.library_file()

    monkeypatch.setattr(build, "_compile", counted)
    processes = [fork.Process(target=compile_together) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(compilations.read_text().splitlines()) == 1


def test_a_source_that_does_not_compile_is_told_with_the_error_and_leaves_nothing(
    small_sources: Path, tmp_path: Path
) -> None:
    (small_sources / "two.cpp").write_text("int two() { return nothing; }\n")
    with pytest.raises(build.KernelsUnavailable, match=r"cannot compile the CPU kernels: .*nothing"):
        build.library_file()
    assert [path.name for path in (tmp_path / "cache" / "hstu").iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_written_is_told(small_sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(build.KernelsUnavailable, match=r"cannot write compiled kernels: .*/cache"):
        build.library_file()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="NEEDS AN X86 PROCESSOR")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_the_kernels_of_older_processors_agree_with_pytorch(processor: str, tmp_path: Path) -> None:
    code = f"""
from hstu.ops.cpu import build
from hstu.ops.check_process import refusals_on_cpu
from hstu.ops.cpu.operators import OPERATORS
build.FLAGS = tuple(flag.replace("native", {processor!r}).replace("-O3", "-O1") for flag in build.FLAGS)
assert refusals_on_cpu(list(OPERATORS)) == dict()
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("checks.json"))


def test_the_sources_are_part_of_the_package() -> None:
    """pyproject.toml names them; a wheel without them could compile nothing."""
    assert '"csrc/*"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert {path.suffix for path in build.SOURCES.iterdir()} == {".cpp", ".h"}
