"""What ``gpu_session.py`` runs, and how it ended: the items of five parts, their expected times and their rehearsals.

All parts together are expected to take less than TOTAL_S, the time of one loan of half an hour without the starts of
the machine. Expected times are estimates: kernels are taken from a compile cache that was made before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REPORT = "{REPORT}"
"""In a command: the file to which it writes JSON."""
SCRATCH = "{SCRATCH}"
"""In a command: an empty directory that is deleted after it."""
OUT = "{OUT}"
"""In a command: the directory of the records, for small traces."""
DATA = "{DATA}"
"""In a command: the preprocessed data of MovieLens-1M."""
LIMITS_S = {1: 180.0, 2: 480.0, 3: 540.0, 4: 540.0, 5: 540.0}
"""Longest time of each part."""
TOTAL_S = 1620.0


@dataclass(frozen=True)
class Item:
    """A command to run."""

    name: str
    expected_s: float
    limit_s: float
    """Seconds after which it is killed."""
    command: Sequence[str]
    """Arguments of Python, or a program and its arguments if ``is_program``."""
    rehearsal: Sequence[str] | None
    """The same on a CPU at a tiny size; None: it cannot be rehearsed."""
    resumes: bool = False
    """Whether a new process continues the report of one that has ended early."""
    is_program: bool = False


def bench(script: str, *options: str) -> list[str]:
    """A benchmark that writes each result to its report."""
    return [f"scripts/bench/{script}.py", *options, "--resume", "--output", REPORT]


def measured(name: str, expected_s: float, script: str, gpu: Sequence[str] = (), tiny: Sequence[str] = ()) -> Item:
    """An operator benchmark on both devices."""
    rehearsal = bench(script, "--device", "cpu", "--rounds", "1", "--threads", "1", "--no-compile", *tiny)
    command = bench(script, "--device", "cuda", "--rounds", "5", "--no-compile", *gpu)
    return Item(name, expected_s, 2.5 * expected_s, command, rehearsal, resumes=True)


TINY = (
    *("NetworkArgs.num_layers = 2", "NetworkArgs.hidden_size = 32", "NetworkArgs.kv_channels = 16"),
    *("items/FeatureArgs.max_sequence_length = 8", "TrainerArgs.train_batch_size = 2"),
    *("item/EmbeddingArgs.item_vocab_size_or_capacity = 100", "user/EmbeddingArgs.item_vocab_size_or_capacity = 100"),
)
"""Bindings that make the benchmark's model tiny."""
Variants = dict[str, tuple[str, ...]]


def steps(name: str, expected_s: float, variants: Variants, tolerance: float | None, *options: str) -> Item:
    """Variants of the benchmark's step, L8 D1024 H4×256 B32 T4099, in one process. ``options``: of the GPU's."""
    chosen = [part for variant, bindings in variants.items() for part in ("--variant", variant, *bindings)]
    chosen += [] if tolerance is None else ["--tolerance", str(tolerance)]
    return Item(
        name,
        expected_s,
        min(2.5 * expected_s, LIMITS_S[2]),
        bench("step_gpu", "--steps", "20", *options, *chosen),
        bench("step_gpu", "--steps", "4", "--bindings", *TINY, *chosen),
        resumes=True,
    )


def checked(backend: str, expected_s: float, head_dim: str = "256") -> Item:
    """The kernels of a backend against float64, with outputs that are filled with nan, each of them twice."""
    command = ["-m", f"hstu.ops.{backend}.self_check", "--head-dim", head_dim, "--dtype", "bfloat16"]
    return Item(f"{backend} against float64", expected_s, 2.5 * expected_s, command, compiled(backend))


def compiled(backend: str) -> list[str]:
    """The kernels of the step and of its self check, compiled and not launched."""
    run = ["ranking", "--gin-config-file", "configs/benchmark_ranking.gin", "--capability", "90", "--cache", SCRATCH]
    return ["-m", "hstu.train.compile_ahead", *run, "--gin-bindings", *BACKENDS[backend]]


def sanitized(tool: str, backend: str) -> Item:
    """The smallest kernels under compute-sanitizer."""
    module = ["-m", f"hstu.ops.{backend}.self_check", "--head-dim", "64", "--dtype", "bfloat16"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *module]
    return Item(f"{tool}, {backend}", 40, 90, command, [*module, "--list", "--device", "cpu"], is_program=True)


ML_1M = "configs/ml_1m_retrieval.gin"
ON_ML_1M = (
    f"DatasetArgs.dataset_path = '{DATA}'",
    *("NetworkArgs.hidden_size = 64", "NetworkArgs.kv_channels = 64", "NetworkArgs.dtype_str = 'bfloat16'"),
    *("NetworkArgs.hidden_dropout = 0.0", "TrainerArgs.train_batch_size = 32"),
)
"""A small model on real data for which every backend has kernels."""
FEW = ("DatasetArgs.max_sequence_length = 20", "TrainerArgs.train_batch_size = 4", "RetrievalArgs.num_negatives = 8")
BACKENDS: Variants = {name: (f"NetworkArgs.kernel_backend = '{name}'",) for name in ("pytorch", "triton", "cutlass")}
LOSS_TOLERANCE = 1e-2
"""Largest relative difference of the losses of bfloat16 kernels over the first 8 steps."""


def on_ml_1m(*bindings: str) -> list[str]:
    """Training by the entry script."""
    trainer = ("num_train_epochs = None", "max_train_iters = 30", "log_interval = 5", "eval_at_end = False")
    options = [f"TrainerArgs.{each}" for each in (*trainer, "eval_interval = 0", f"output_dir = '{SCRATCH}'")]
    start = ["pretrain_gr_retrieval.py", "--gin-config-file", ML_1M, "--gin-bindings", *ON_ML_1M]
    return [*start, *options, *BACKENDS["pytorch"], "TrainerArgs.ckpt_save_interval = -1", *bindings]


LOSSES = ("--task", "retrieval", "--gin-config-file", ML_1M, "--tolerance", str(LOSS_TOLERANCE))
KERNELS = [part for name, bindings in BACKENDS.items() for part in ("--variant", name, *bindings)]
PIPELINES: Variants = {name: (f"TrainerArgs.pipeline_type = '{name}'",) for name in ("none", "native", "prefetch")}
RESIDUAL = "NetworkArgs.bfloat16_residual = True"
BIAS = "NetworkArgs.position_encoding = ('absolute', 'relative_bias')"
WIDTH_128 = ("NetworkArgs.item_embedding_dim = 128", "NetworkArgs.contextual_embedding_dim = 128")
"""The widths of NVIDIA's benchmark. MLPs take them to the hidden size."""
UVM = "item/EmbeddingArgs.compute_kernel = 'fused_uvm'"
CACHED = "item/EmbeddingArgs.compute_kernel = 'fused_uvm_caching'"
THE_STEP: Variants = {
    "cutlass": BACKENDS["cutlass"],
    "triton": BACKENDS["triton"],
    "cutlass, bfloat16_residual": (*BACKENDS["cutlass"], RESIDUAL),
    "cutlass, relative bias": (*BACKENDS["cutlass"], BIAS),
    "cutlass, width 128": (*BACKENDS["cutlass"], *WIDTH_128),
}
PARTS: dict[int, tuple[Item, ...]] = {
    1: (  # does it run, and are the losses right?
        Item(
            "imports",
            25,
            90,
            ["scripts/bench/gpu_session.py", "--imports", REPORT],
            ["scripts/bench/gpu_session.py", "--imports", REPORT],
        ),
        Item(
            "kernel backends on ML-1M",
            60,
            120,
            bench("step_gpu", *LOSSES, "--steps", "12", "--bindings", *ON_ML_1M, *KERNELS),
            bench("step_gpu", *LOSSES, "--steps", "4", "--bindings", *ON_ML_1M, *FEW, *KERNELS),
            resumes=True,
        ),
        Item("training on ML-1M", 30, 60, on_ml_1m(), on_ml_1m(*FEW)),
    ),
    2: (  # the step
        steps("the step", 200, THE_STEP, None, "--trace", f"{OUT}/step.json.gz"),
    ),
    3: (  # the kernels
        measured(
            "attention",
            120,
            "attention",
            ("--length", "4096", "512", "1024", "2048", "16384", "8192"),
            ("--length", "32"),
        ),
        measured("operators", 90, "operators"),
        measured("layer", 60, "layer", ("--length", "4096", "1024", "2048", "8192"), ("--length", "32")),
        checked("cutlass", 40),
        checked("triton", 70),
    ),
    4: (  # pipelines, tables, sharding
        steps("pipelines", 80, PIPELINES, 0.0, "--trace", f"{OUT}/pipeline.json.gz"),
        measured("dynamic tables", 90, "dynamic", (), ("--rows", "300", "--lookups", "256")),
        steps(
            "tables in host memory",
            110,
            {
                "on the device": (),
                "uvm, cached": (CACHED,),
                "uvm, cached, prefetch": (CACHED, *PIPELINES["prefetch"]),
                "uvm": (UVM,),
            },
            1e-3,
        ),
        steps(
            "FSDP",
            70,
            {
                "whole": (),
                "FSDP": ("DataParallelArgs.sharding = 'weights'",),
            },
            1e-3,
        ),
    ),
    5: (  # robustness
        Item(
            "killed and resumed",
            70,
            150,
            ["scripts/bench/killed_run.py", DATA, SCRATCH, "--output", REPORT],
            [
                "scripts/bench/killed_run.py",
                DATA,
                SCRATCH,
                "--output",
                REPORT,
                "--iterations",
                "20",
                "--bindings",
                *FEW,
            ],
        ),
        sanitized("memcheck", "cutlass"),
        sanitized("memcheck", "triton"),
        Item(
            "pytest -m gpu",
            230,
            350,
            ["-m", "pytest", "-m", "gpu", "-n", "4", "-v", "-rfE", "--tb=line", "--durations=10"],
            ["-m", "pytest", "-m", "gpu", "-q", "tests/ops/cutlass/test_self_check.py"],
        ),
        sanitized("racecheck", "cutlass"),
        sanitized("racecheck", "triton"),
    ),
}


def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of an item that reports several."""
    report = record.get("report")
    lists = [value for value in report.values() if isinstance(value, list)] if isinstance(report, dict) else []
    return [row for rows in lists for row in rows if isinstance(row, dict)]


def failures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results that are errors. A refusal is none: it says what this machine or configuration cannot do."""
    return [row for row in rows_of(record) if "error" in row]


def without_failures(report: Any) -> Any:
    """The report that a new process continues."""
    if not isinstance(report, dict):
        return None
    return {
        key: [row for row in value if not (isinstance(row, dict) and "error" in row)]
        if isinstance(value, list)
        else value
        for key, value in report.items()
    }


def state_of(record: Mapping[str, Any]) -> str:
    """How an item ended."""
    code, rows, failed = record["exit_code"], len(rows_of(record)), len(failures(record))
    ended = "ok" if code == 0 else f"killed after {record['killed_after_s']} s" if code is None else f"failed ({code})"
    if failed:
        ended = f"{failed} of {rows} failed" if code == 0 else f"{ended}, {failed} of {rows} failed"
    return f"{ended}, {record['seconds']:.0f} s"
