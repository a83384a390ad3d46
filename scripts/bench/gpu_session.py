"""Measure everything on a GPU that is at hand for minutes: five parts, the most important item of each first.

    python scripts/bench/gpu_session.py --part 1 2 --budget-s 560 --out results              measure
    python scripts/bench/gpu_session.py --part 1 2 --budget-s 560 --out results --dry-run    rehearse on a CPU

Each item is a process with its own time limit. OUT/ITEM.json holds its results, each as soon as it exists; OUT/ITEM.log
holds what it printed; OUT/session.json says how it ended. A later call with the same --out skips items that ended well
and keeps the results of the others. Where an item loses its process, another process measures what it had not begun.

With --dry-run all items run on a CPU at tiny sizes: a mistake then costs no time on the GPU. Kernels for GPUs are
compiled and not launched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT, SCRATCH, OUT, DATA = "{REPORT}", "{SCRATCH}", "{OUT}", "{DATA}"
"""In a command: its JSON file, an empty directory that is deleted after it, the directory of all results, and the
preprocessed data of MovieLens-1M."""
START_S = 15.0
"""Shortest time for which an item is begun."""
KILL_S = 10.0
REHEARSAL = 4
"""How much longer a rehearsal may take, on slow cores."""


@dataclass(frozen=True)
class Item:
    """A command to run."""

    name: str
    limit_s: float
    """Seconds after which it is killed."""
    command: Sequence[str]
    """Arguments of Python, or a program and its arguments if ``is_program``."""
    rehearsal: Sequence[str] | None
    """The same on a CPU at a tiny size; None: it cannot be rehearsed."""
    is_program: bool = False

    @property
    def stem(self) -> str:
        """Name of its files, which the owner of a lent machine may move by any means."""
        return re.sub(r"\W+", "_", self.name)


def bench(script: str, *options: str) -> list[str]:
    """A benchmark that writes each result to its report, and continues a report that exists."""
    return [f"scripts/bench/{script}.py", *options, "--resume", "--output", REPORT]


def measured(name: str, limit_s: float, script: str, gpu: Sequence[str] = (), tiny: Sequence[str] = ()) -> Item:
    """An operator benchmark on both devices."""
    rehearsal = bench(script, "--device", "cpu", "--rounds", "1", "--threads", "1", "--no-compile", *tiny)
    return Item(name, limit_s, bench(script, "--device", "cuda", "--rounds", "5", "--no-compile", *gpu), rehearsal)


Variants = dict[str, tuple[str, ...]]
TINY = (
    *("NetworkArgs.num_layers = 2", "NetworkArgs.hidden_size = 32", "NetworkArgs.kv_channels = 16"),
    *("items/FeatureArgs.max_sequence_length = 8", "TrainerArgs.train_batch_size = 2"),
    *("item/EmbeddingArgs.item_vocab_size_or_capacity = 100", "user/EmbeddingArgs.item_vocab_size_or_capacity = 100"),
)
"""Bindings that make the benchmark's model tiny."""


def steps(name: str, limit_s: float, variants: Variants, tolerance: float | None, *options: str) -> Item:
    """Variants of the benchmark's step, L8 D1024 H4×256 B32 T4099, in one process. ``options``: of the GPU's."""
    chosen = [part for variant, bindings in variants.items() for part in ("--variant", variant, *bindings)]
    chosen += [] if tolerance is None else ["--tolerance", str(tolerance)]
    on_gpu = bench("step_gpu", "--steps", "20", *options, *chosen)
    return Item(name, limit_s, on_gpu, bench("step_gpu", "--steps", "4", "--bindings", *TINY, *chosen))


BACKENDS: Variants = {name: (f"NetworkArgs.kernel_backend = '{name}'",) for name in ("pytorch", "triton", "cutlass")}
PIPELINES: Variants = {name: (f"TrainerArgs.pipeline_type = '{name}'",) for name in ("none", "native", "prefetch")}


def against_float64(backend: str, head_dim: int) -> list[str]:
    """The tests that compare the kernels of a backend with PyTorch; skipped without a GPU."""
    return ["-m", "pytest", "-m", "gpu", "-q", "tests/ops/test_self_check.py", "-k", f"{backend}-{head_dim}"]


def checked(backend: str, limit_s: float) -> Item:
    """The kernels of a backend against float64. A rehearsal compiles those of the step."""
    compiled = ["ranking", "--gin-config-file", "configs/benchmark_ranking.gin", "--capability", "90"]
    return Item(
        f"{backend} against float64",
        limit_s,
        against_float64(backend, 256),
        ["scripts/bench/compile_ahead.py", *compiled, "--cache", SCRATCH, "--gin-bindings", *BACKENDS[backend]],
    )


def sanitized(tool: str, backend: str) -> Item:
    """The smallest kernels under compute-sanitizer."""
    tests = against_float64(backend, 64)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *tests]
    return Item(f"{tool}, {backend}", 90, command, tests, is_program=True)


ON_ML_1M = (
    f"DatasetArgs.dataset_path = '{DATA}'",
    *("NetworkArgs.hidden_size = 64", "NetworkArgs.kv_channels = 64", "NetworkArgs.dtype_str = 'bfloat16'"),
    *("NetworkArgs.hidden_dropout = 0.0", "TrainerArgs.train_batch_size = 32"),
)
"""A small model on real data for which every backend has kernels."""
FEW = ("DatasetArgs.max_sequence_length = 20", "TrainerArgs.train_batch_size = 4", "RetrievalArgs.num_negatives = 8")
ML_1M = ("--gin-config-file", "configs/ml_1m_retrieval.gin")
LOSSES = ("--task", "retrieval", *ML_1M, "--tolerance", "0.01")
"""The losses of bfloat16 kernels may differ by 1 % over the first 8 steps."""
KERNELS = [part for name, bindings in BACKENDS.items() for part in ("--variant", name, *bindings)]


def on_ml_1m(*bindings: str) -> list[str]:
    """Training by the entry script."""
    trainer = ("num_train_epochs = None", "max_train_iters = 30", "log_interval = 5", "eval_at_end = False")
    options = [f"TrainerArgs.{each}" for each in (*trainer, "eval_interval = 0", f"output_dir = '{SCRATCH}'")]
    start = ["pretrain_gr_retrieval.py", *ML_1M, "--gin-bindings", *ON_ML_1M]
    return [*start, *options, *BACKENDS["pytorch"], "TrainerArgs.ckpt_save_interval = -1", *bindings]


PACKAGES = ("torch", "triton", "fbgemm_gpu", "torchrec", "megatron.core", "gin", "cutlass", "pyarrow", "pytest")
IMPORTS = f"""
import importlib
for name in {PACKAGES}:
    print(name, getattr(importlib.import_module(name), "__version__", ""), flush=True)
import torch
if torch.cuda.is_available():
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), float((a @ a).sum()))
"""
THE_STEP: Variants = {
    "cutlass": BACKENDS["cutlass"],
    "triton": BACKENDS["triton"],
    "cutlass, relative bias": (
        *BACKENDS["cutlass"],
        "NetworkArgs.position_encoding = ('absolute', 'relative_bias')",
    ),
    "cutlass, width 128": (  # NVIDIA's benchmark: MLPs take these widths to the hidden size
        *BACKENDS["cutlass"],
        "NetworkArgs.item_embedding_dim = 128",
        "NetworkArgs.contextual_embedding_dim = 128",
    ),
}
CACHED = "item/EmbeddingArgs.compute_kernel = 'fused_uvm_caching'"
HOST_TABLES: Variants = {
    "on the device": (),
    "uvm, cached": (CACHED,),
    "uvm, cached, prefetch": (CACHED, *PIPELINES["prefetch"]),
    "uvm": ("item/EmbeddingArgs.compute_kernel = 'fused_uvm'",),
}
FSDP: Variants = {"whole": (), "FSDP": ("DataParallelArgs.sharding = 'weights'",)}
LENGTHS = ("--length", "4096", "512", "1024", "2048", "16384", "8192")
PARTS: dict[int, tuple[Item, ...]] = {
    1: (  # does it run, and are the losses right?
        Item("machine", 20, ["nvidia-smi"], None, is_program=True),
        Item("imports", 90, ["-c", IMPORTS], ["-c", IMPORTS]),
        Item(
            "kernel backends on ML-1M",
            120,
            bench("step_gpu", *LOSSES, "--steps", "12", "--bindings", *ON_ML_1M, *KERNELS),
            bench("step_gpu", *LOSSES, "--steps", "4", "--bindings", *ON_ML_1M, *FEW, *KERNELS),
        ),
        Item("training on ML-1M", 60, on_ml_1m(), on_ml_1m(*FEW)),
    ),
    2: (steps("the step", 480, THE_STEP, None, "--trace", f"{OUT}/step.json.gz"),),
    3: (  # the kernels
        measured("attention", 240, "attention", LENGTHS, ("--length", "32")),
        measured("operators", 200, "operators"),
        measured("layer", 150, "layer", ("--length", "4096", "1024", "2048", "8192"), ("--length", "32")),
        checked("cutlass", 100),
        checked("triton", 180),
    ),
    4: (  # pipelines, tables, sharding
        steps("pipelines", 200, PIPELINES, 0.0, "--trace", f"{OUT}/pipeline.json.gz"),
        measured("dynamic tables", 200, "dynamic", (), ("--rows", "300", "--lookups", "256")),
        steps("tables in host memory", 250, HOST_TABLES, 1e-3),
        steps("FSDP", 180, FSDP, 1e-3),
    ),
    5: (  # robustness
        sanitized("memcheck", "cutlass"),
        sanitized("memcheck", "triton"),
        Item(
            "pytest -m gpu",
            350,
            ["-m", "pytest", "-m", "gpu", "-n", "4", "-v", "-rfE", "--tb=line", "--timeout", "90", "--durations=10"],
            against_float64("cutlass", 64),
        ),
        sanitized("racecheck", "cutlass"),
        sanitized("racecheck", "triton"),
    ),
}


def rows_of(report: Path) -> list[dict[str, Any]]:
    """The results of an item."""
    found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return [row for rows in found.values() if isinstance(rows, list) for row in rows if isinstance(row, dict)]


def run(item: Item, options: argparse.Namespace, limit_s: float) -> str:
    """Run an item to its end or its limit, in a new process if one ends early; returns how it ended."""
    report, begun = options.out / f"{item.stem}.json", time.monotonic()
    while True:
        before, left = len(rows_of(report)), begun + limit_s - time.monotonic()
        code = run_once(item, options, report, left)
        more, left = len(rows_of(report)) > before, begun + limit_s - time.monotonic()
        if not code or not more or left < START_S:
            break
    rows = rows_of(report)
    failed = sum("error" in row for row in rows)
    ended = "killed" if code is None else "ok" if code == 0 else f"failed ({code})"
    if failed:
        ended = f"{failed} of {len(rows)} results failed, {ended}"
    return f"{ended}, {time.monotonic() - begun:.0f} s"


def run_once(item: Item, options: argparse.Namespace, report: Path, limit_s: float) -> int | None:
    """One process of an item: its exit code, None if it was killed at its limit."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if options.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = list((item.rehearsal or ()) if options.dry_run else item.command)
    if options.dry_run or not item.is_program:
        command = [sys.executable, *command]
    with tempfile.TemporaryDirectory() as folder, open(options.out / f"{item.stem}.log", "ab") as sink:
        for name, path in {REPORT: report, SCRATCH: folder, OUT: options.out, DATA: options.data}.items():
            command = [part.replace(name, str(path)) for part in command]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # stuck in the driver
                process.wait(KILL_S)


def show(item: Item, options: argparse.Namespace) -> None:
    """Print the results of an item; the end of the output of one without results."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(options.out / f"{item.stem}.json")]
    log = options.out / f"{item.stem}.log"
    if not lines and log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    print("".join(f"    {line[:400]}\n" for line in lines), end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns 1 if an item has failed or was not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, nargs="+", choices=tuple(PARTS), required=True, help="in this order")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for this call (540)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="directory of the results")
    parser.add_argument("--data", type=Path, default=Path("tmp_data/ml-1m"), help="preprocessed MovieLens-1M")
    parser.add_argument("--only", nargs="+", default=[""], help="items whose names contain one of these")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU at tiny sizes")
    options = parser.parse_args(argv)
    options.data = options.data.absolute()
    options.out = options.out.absolute() / ("dry-run" if options.dry_run else "")
    options.out.mkdir(parents=True, exist_ok=True)
    states, patience = options.out / "session.json", REHEARSAL if options.dry_run else 1
    ended: dict[str, str] = json.loads(states.read_text(encoding="utf-8")) if states.exists() else {}
    ends = time.monotonic() + options.budget_s
    items = [item for part in options.part for item in PARTS[part] if any(text in item.name for text in options.only)]
    if options.dry_run:
        items = [item for item in items if item.rehearsal is not None]
    for item in items:
        left = ends - time.monotonic()
        if not ended.get(item.name, "").startswith("ok") and left > START_S:
            ended[item.name] = run(item, options, min(patience * item.limit_s, left))
            states.write_text(json.dumps(ended, indent=1), encoding="utf-8")
        print(f"{item.name:34} {ended.get(item.name, 'no time left')}", flush=True)
        show(item, options)
    return 0 if all(ended.get(item.name, "").startswith("ok") for item in items) else 1


if __name__ == "__main__":
    sys.exit(main())
