"""The scripts for a GPU at hand.

An item that fails or hangs costs nothing but its limit, and a later call goes on. The bundle for a machine without a
package index: device code that is left, and archives that are refused.
"""

import json
import os
import struct
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import DeviceType

from scripts.gpu_bundle import libraries, make, unpack
from tests.conftest import REPOSITORY, write_small_store
from tests.helpers import flip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as if run from its directory. An item is begun if a second is left."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    module = import_module("gpu_session")
    monkeypatch.setattr(module, "START_S", 1.0)
    return module


def run(script: ModuleType, out: Path, *options: str, budget_s: float = 100) -> tuple[int, dict[str, str]]:
    """The exit code of a rehearsal, and how its items ended."""
    code = script.main([f"--budget-s={budget_s}", f"--out={out}", "--dry-run", *(options or ("--part=1",))])
    return code, json.loads((out / "dry-run" / "session.json").read_text())


def item(script: ModuleType, name: str, code: str, limit_s: float = 15) -> Any:
    return script.Item(name, limit_s, [], ["-c", code, script.REPORT, script.SCRATCH])


HANGS = "import os, time; print('hanging', flush=True); os.fork(); time.sleep(1000)"
# Measures three cases. The second one raises, ends the process, or passes.
CASES = f"""
import os, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(REPOSITORY / "scripts" / "bench")!r})
from harness import attempt, earlier
file = Path(sys.argv[1])
report = earlier(SimpleNamespace(output=file, resume=True))
for number in range(3):
    attempt(report, "rows", {{"variant": number}}, lambda: SECOND if number == 1 else [{{"by": os.getpid()}}], file)
"""


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "dry-run" / f"{name}.json").read_text())["rows"]
    return sorted(found, key=lambda row: row["variant"])


@pytest.mark.slow
def test_every_item_ends_and_a_later_call_measures_what_failed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    items = item(script, "fails", CASES.replace("SECOND", "1 / 0")), item(script, "hangs", HANGS, limit_s=2)
    monkeypatch.setitem(script.PARTS, 1, (*items, script.Item("not on a CPU", 9, [], None)))
    code, ended = run(script, tmp_path)
    first = rows(tmp_path, "fails")
    assert code == 1 and ended["fails"].startswith("1 of 3 results failed") and "ZeroDivision" in first[1]["error"]
    assert ended["hangs"].startswith("killed") and "not on a CPU" not in ended
    assert "hanging" in capfd.readouterr().out

    items = item(script, "fails", CASES.replace("SECOND", "[{'by': 0}]")), item(script, "hangs", "print('works')")
    monkeypatch.setitem(script.PARTS, 1, items)
    code, ended = run(script, tmp_path)
    later = rows(tmp_path, "fails")
    assert code == 0 and later[0] == first[0] and later[1]["by"] == 0 and ended["hangs"].startswith("ok")


def test_after_a_case_that_ends_the_process_another_process_measures_the_rest(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, 1, (item(script, "cases", CASES.replace("SECOND", "os.abort()")),))
    code, ended = run(script, tmp_path)
    first, second, third = rows(tmp_path, "cases")
    assert code == 1 and "the process ended" in second["error"] and first["by"] != third["by"]
    assert ended["cases"].startswith("1 of 3 results failed, ok")


def test_an_item_for_which_no_time_is_left_is_not_begun(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, 1, (item(script, "long", HANGS), item(script, "late", "print(1)")))
    code, ended = run(script, tmp_path, budget_s=2)
    assert code == 1 and list(ended) == ["long"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", [1, 2, 3, 4, 5])
def test_every_item_of_a_part_can_be_rehearsed(
    script: ModuleType, tmp_path: Path, part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 300, rng.integers(5, 40)).tolist() for _ in range(200)]
    write_small_store(tmp_path / "data", items, num_items=300)
    code, ended = run(script, tmp_path, f"--part={part}", f"--data={tmp_path / 'data'}", budget_s=1100)
    assert code == 0, (ended, capfd.readouterr().out)


def test_a_profile_is_summed_up(script: ModuleType) -> None:
    def event(name: str, begin: float, end: float, device: DeviceType, stream: int = 7) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end)
        which = {"device_type": device, "device_resource_id": stream, "is_user_annotation": False}
        return SimpleNamespace(name=name, time_range=span, **which)

    events = [
        event("nvjet_gemm", 0, 1000, DeviceType.CUDA),
        event("Memcpy HtoD", 500, 1500, DeviceType.CUDA, stream=20),
        event("nvjet_gemm", 3000, 4000, DeviceType.CUDA),
        event("cudaEventSynchronize", 0, 2000, DeviceType.CPU),
        event("aten::mm", 0, 5000, DeviceType.CPU),
    ]
    report = import_module("step_gpu").summary(events, steps=2)
    assert report["busy_ms"] == 1.25 and report["kernels_per_step"] == 1.5
    assert report["overlap_ms"] == 0.25, "half a millisecond of the copy runs beside the product, in one of two steps"
    assert report["categories"] == {"matrix products": 1.0, "copies": 0.5}
    assert report["idle_ms"] == 0.75
    assert report["gaps"] == [{"us": 1500.0, "after": "Memcpy HtoD", "before": "nvjet_gemm"}]
    assert report["kernels"] == [
        {"name": "nvjet_gemm", "per_step": 1.0, "ms": 1.0},
        {"name": "Memcpy HtoD", "per_step": 0.5, "ms": 0.5},
    ]
    assert report["waits"] == [{"name": "cudaEventSynchronize", "per_step": 0.5, "ms": 1.0}]


def test_every_gpu_kernel_of_ours_has_a_category(script: ModuleType) -> None:
    category_of = import_module("step_gpu").category_of
    cutlass = "kernel_cutlass_kernel_hstuopscutlasssm90{}Sm90_object_at__cutlasscuteatomCopyAtom"
    assert category_of(cutlass.format("Forward")) == category_of("attention_forward") == "attention forward"
    assert category_of(cutlass.format("Backward")) == category_of("attention_backward_keys") == "attention backward"
    assert category_of("linear_silu") == category_of("sm90_xmma_gemm_bf16") == "matrix products"
    assert category_of("silu_kernel") == "SiLU" and category_of("permute_rows") == "tokens"


def test_on_a_gpu_several_launches_share_a_pair_of_events(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = import_module("harness")
    monkeypatch.setitem(harness.LAUNCHES, "cpu", 5)
    called: list[str] = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            called.append("forward")
            time.sleep(0.01)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            called.append("backward")
            time.sleep(0.02)
            return grad

    x = torch.ones(3, requires_grad=True)
    times = harness.time_passes({"slow": harness.Pass(lambda: Slow.apply(x), [x])}, torch.device("cpu"), rounds=2)
    rounds = 2 + harness.WARM_UP
    assert called.count("forward") == 5 * rounds + 1 and called.count("backward") == 5 * rounds
    assert 10 <= times["slow"]["forward_ms"] < 19 and 20 <= times["slow"]["backward_ms"] < 38


def image(architecture: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQIIII", 2, 0x101, 64, len(payload), 0, 0, 0, architecture)
    return header.ljust(40, b"\7") + struct.pack("<QQQ", 0x8011, 0, 9999) + payload


def container(*images: bytes) -> bytes:
    body = b"".join(images)
    return struct.pack("<IHHQ", libraries.CONTAINER_MAGIC, 1, 16, len(body)) + body


def elf(sections: dict[bytes, bytes]) -> bytearray:
    """An ELF file of these sections alone."""
    names = b"\0" + b"".join(name + b"\0" for name in [*sections, b".shstrtab"])
    library, rows = bytearray(64), [bytes(64)]
    for name, contents in [*sections.items(), (b".shstrtab", names)]:
        rows.append(
            struct.pack("<IIQQQQIIQQ", names.index(name + b"\0"), 1, 0, 0, len(library), len(contents), 0, 0, 8, 0)
        )
        library += contents
    struct.pack_into("<Q", library, 40, len(library))
    struct.pack_into("<HH", library, 60, len(rows), len(rows) - 1)
    return library + b"".join(rows)


def cubin(fill: bytes) -> bytes:
    return b"\x7fELF".ljust(64, fill) + fill * 1000


CODE = {architecture: cubin(bytes([architecture])) for architecture in (80, 90, 100)}
EVERYWHERE = container(*(image(architecture, code) for architecture, code in CODE.items()))
OTHER = bytes(range(1, 101)) + bytes(4)


def test_only_the_code_of_one_architecture_is_left_and_nothing_moves() -> None:
    original = elf({b".text": OTHER, b".nv_fatbin": EVERYWHERE + bytes(24) + EVERYWHERE, b".data": OTHER})
    library = bytearray(original)
    libraries.keep_device_code(library, 90, [True, False])
    assert len(library) == len(original)
    (before, dropped_before), (kept, dropped) = map(list, map(libraries.containers, (original, library)))
    assert [kept.begin, dropped.begin] == [before.begin, dropped_before.begin]
    (of_90,) = kept.images
    assert of_90.architecture == 90 and library[of_90.begin : of_90.end] == image(90, CODE[90])
    (stub,) = dropped.images
    assert stub.architecture == 80 and library[stub.begin : stub.end].endswith(libraries.STUB)
    assert struct.unpack_from("<Q", library, stub.begin + 40) == (0x11,)  # not compressed
    offset, size = libraries.section(original, b".nv_fatbin") or (0, 0)
    assert library[:offset] == original[:offset] and library[offset + size :] == original[offset + size :]
    assert CODE[80][64:] not in library and CODE[100][64:] not in library and library.count(CODE[90]) == 1


def test_device_code_that_is_not_understood_or_lacks_the_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="where a container begins"):
        list(libraries.containers(elf({b".nv_fatbin": b"\1" * 32})))
    with pytest.raises(ValueError, match="no image that could remain"):
        libraries.keep_device_code(elf({b".nv_fatbin": container(image(80, CODE[80]))}), 90, [True])
    with pytest.raises(ValueError, match="shorter"):
        libraries.keep_device_code(elf({b".nv_fatbin": EVERYWHERE * 2}), 90, [True])


def test_kernels_of_pooled_lookups_and_foreign_optimizers_are_dropped() -> None:
    kept = [
        "_Z55split_embedding_nobag_codegen_forward_unweighted_kernelIN3c10",
        "_Z61dense_embedding_nobag_codegen_forward_unweighted_small_kernelIN3c10",
        "_Z86split_embedding_nobag_backward_codegen_rowwise_adagrad_unweighted_kernel_cta_per_row_1IN3c10",
        "_ZN10fbgemm_gpu23permute_2D_data_kernel",
    ]
    dropped = [
        "_Z47split_embedding_codegen_forward_unweighted_kernelIN3c10",
        "_Z73ssd_embedding_nobag_backward_codegen_rowwise_adagrad_unweighted_kernel",
        "_Z73split_embedding_nobag_backward_codegen_partial_rowwise_adam_unweighted_kernel",
        "_Z73split_embedding_nobag_backward_codegen_rowwise_adagrad_with_counter_unweighted_kernel",
        "_ZN4nbit59FP16_int_nbit_split_embedding_nobag_codegen_forward_unweighted_kernel_small_L",
    ]
    shared = "_ZN3cub26CUB_300001_SM_800_900_10006detail11EmptyKernelIvEEvv"
    assert [make.is_needed([shared, name]) for name in kept + dropped] == [True] * 4 + [False] * 5
    assert make.is_needed([]) and make.is_needed([shared])


def test_blanked_pages_are_whole_pages_of_machine_code() -> None:
    page = libraries.PAGE
    original = elf({b".init": bytes(100), b".text": b"\x90" * (3 * page), b".data": b"\x90" * page})
    library = bytearray(original)
    assert libraries.keep_pages(library, 0, lambda number: number == 1) == 1  # 0 and 3 are filled in part
    assert library[2 * page : 3 * page] == b"\xcc" * page and library.count(b"\xcc") == page
    assert library[: 2 * page] == original[: 2 * page] and library[3 * page :] == original[3 * page :]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one module and one store, for this Python."""
    root, folder = tmp_path / "root", tmp_path / "bundle"
    for file, contents in {"site/carried.py": "__version__ = '7'\n", "data/toy/numbers": "1"}.items():
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(contents)
    libraries.write(bytes(50_000_000) + b"code", root / "site" / "library.so")
    folder.mkdir()
    for name in ("site", "data"):
        make.pack(root, [root / name], folder / f"{name}.tar.xz")
    for script in ("unpack.py", "activate.sh"):
        (folder / script).write_bytes((REPOSITORY / "scripts" / "gpu_bundle" / script).read_bytes())
    monkeypatch.setattr(make, "IMPORTS", ("carried",))
    monkeypatch.setattr(make, "NEEDED", {"python": "3", "torch": metadata.version("torch").partition("+")[0]})
    make.write_manifest(folder)
    return folder


def activate(bundle: Path, directory: Path, command: str) -> "subprocess.CompletedProcess[str]":
    bundle.with_name("repository").mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", "-c", f"source {bundle}/activate.sh {directory} && {command}"],
        cwd=bundle.with_name("repository"),
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_is_unpacked_once_and_found_by_programs(bundle: Path, tmp_path: Path) -> None:
    code = "import carried, os; print(carried.__file__, os.environ['TRITON_CACHE_DIR'])"
    read = f'cat tmp_data/toy/numbers && $PYTHON -c "{code}"'
    first = activate(bundle, tmp_path / "unpacked", read)
    assert first.returncode == 0, first.stderr
    assert "carried 7" in first.stdout
    assert f"{tmp_path}/unpacked/site/carried.py {tmp_path}/unpacked/caches/triton" in first.stdout
    library = tmp_path / "unpacked" / "site" / "library.so"
    assert library.stat().st_size == 50_000_004 and library.read_bytes().endswith(b"\0code")
    assert library.stat().st_blocks * 512 < 1_000_000  # holes are not written
    assert sum(file.stat().st_size for file in bundle.glob("*.tar.xz")) < 10_000
    again = activate(bundle, tmp_path / "unpacked", read)
    assert again.returncode == 0 and "unpacked before" in again.stdout


def test_a_flipped_byte_is_refused(bundle: Path, tmp_path: Path) -> None:
    archive = bundle / "site.tar.xz"
    flip(archive)
    damaged = activate(bundle, tmp_path / "unpacked", "true")
    assert damaged.returncode == 1 and not (tmp_path / "unpacked").exists()
    assert "site.tar.xz: found" in damaged.stderr and "make the bundle again" in damaged.stderr
    archive.unlink()
    assert "found no file" in activate(bundle, tmp_path / "unpacked", "true").stderr


def test_another_machine_and_a_package_that_does_not_import_are_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / unpack.MANIFEST).read_text())
    for change, said in (
        ({"needs": {"torch": "1.0"}}, "needed 1.0; use or make a bundle for this machine"),
        ({"imports": ["carried", "forgotten"]}, "No module named 'forgotten'"),
    ):
        (bundle / unpack.MANIFEST).write_text(json.dumps(manifest | change))
        for _ in range(2):
            refused = activate(bundle, tmp_path / "unpacked", "true")
            assert refused.returncode == 1 and said in refused.stderr


def test_kernels_of_another_compiler_are_not_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "NEEDED", {})
    monkeypatch.setattr(unpack.metadata, "version", dict.fromkeys(make.COMPILERS, "4.0.0").__getitem__)
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / "bundle"), f"--caches={tmp_path}"])
    needed = make.carried_versions()["nvidia-cutlass-dsl"]
    assert f"found nvidia-cutlass-dsl 4.0.0, needed {needed}" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
