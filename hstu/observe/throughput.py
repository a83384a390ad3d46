"""Speed of training: FLOPs of a step, rates between two log lines, the peak that MFU is relative to, and profiles."""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, TypeVar

import numpy as np
import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from hstu.config.args import NetworkArgs, TrainerArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import sequence_tokens
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import Loads
from hstu.observe.records import Throughput
from hstu.ops.costs import Window, sequence_flops

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Gather = Callable[[list[float]], list[list[float]]]
SLOW_BY = 0.2
"""Log lines name the slowest rank if it takes longer than the median rank by this share."""


@dataclass(frozen=True)
class FlopCounter:
    """Counts the tokens and FLOPs of sequences in one network."""

    network: NetworkArgs
    roles: FeatureRoles

    def count(self, batch: HSTUBatch) -> tuple[int, float]:
        """(tokens, FLOPs of forward and backward) of a batch, without padding."""
        loads = self.per_sequence(batch.item_lengths, batch.num_candidates_host)
        return int(loads.tokens.sum()), float(loads.costs.sum())

    def per_sequence(self, item_lengths: np.ndarray, num_candidates: np.ndarray) -> Loads:
        """Tokens and FLOPs of each sequence. item_lengths, num_candidates: integers [S]."""
        candidates, whole = np.asarray(num_candidates, dtype=np.int64), self.network.whole_layers
        spans = self.network.attention_spans
        tokens, costs = self._layers(spans[:whole], np.asarray(item_lengths), candidates)
        if spans[whole:]:  # layers after a truncation
            assert self.network.truncate_to_items is not None
            history = np.minimum(item_lengths - candidates, self.network.truncate_to_items)
            costs = costs + self._layers(spans[whole:], history + candidates, candidates)[1]
        return Loads(tokens, costs)

    def _layers(
        self, spans: Sequence[int | None], item_lengths: np.ndarray, num_candidates: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        per_item = self.network.tokens_per_item(self.roles.action is not None)
        tokens = sequence_tokens(item_lengths, len(self.roles.contextual), per_item)
        full, contextuals = self.network.min_full_attention_tokens, len(self.roles.contextual)
        costs = sequence_flops(
            tokens,
            num_candidates * per_item,
            num_layers=len(spans),
            hidden_size=self.network.hidden_size,
            num_heads=self.network.num_attention_heads,
            head_dim=self.network.kv_channels,
            is_causal=self.network.is_causal,
            windows=[Window(span, full, contextuals) for span in spans],
        )
        return tokens, costs


def rank_times(own: np.ndarray, step_s: float) -> dict[str, float]:
    """Seconds per step by rank. The slowest rank spends the most on its own: computing and waiting for its data.

    own: float64 [ranks, 2], seconds of computing (forward and backward, without waits for other ranks) and of waiting
    for data.
    """
    totals, median, mean = own.sum(1), np.median(own, 0), own.mean(0)
    slowest = int(totals.argmax())
    return {
        "slowest_rank": slowest,
        # What it spends on its own beyond the median rank, as a share of that.
        "slowest_excess": float(totals[slowest] / max(np.median(totals), 1e-9)) - 1,
        "slowest_compute_s": float(own[slowest, 0]),
        "slowest_data_wait_s": float(own[slowest, 1]),
        "median_compute_s": float(median[0]),
        "median_data_wait_s": float(median[1]),
        "mean_compute_s": float(mean[0]),
        # The rest of a step: collectives, with the wait for slower ranks, and look-ups and updates.
        "mean_collective_s": max(step_s - float(mean.sum()), 0.0),
    }


class ThroughputMeter:
    """Accumulates counts of this rank; ``take`` converts them to rates and resets them.

    It never waits for the device: counts are host integers, and time is wall-clock time without ``paused`` time. For
    exact rates on a GPU, read the loss, which waits for the device, before ``take``. ``peak_tflops``: peak of this
    rank's device.
    """

    def __init__(self, peak_tflops: float = math.nan, clock: Callable[[], float] = time.perf_counter) -> None:
        self._peak = peak_tflops
        self._clock = clock
        self._reset()

    def add(self, *, samples: int, tokens: int, flops: float = 0.0) -> None:
        """Count one step of this rank: samples without padding, tokens, and FLOPs (hstu/ops/costs.py)."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time, for example of an evaluation or a checkpoint."""
        begun = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - begun

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches and count the time to get each as data wait. Resets the meter at the first."""
        self._reset()
        begun = self._clock()
        for batch in batches:
            self._wait_s += self._clock() - begun
            yield batch
            begun = self._clock()

    def take(self, compute_s: float = 0.0, gather: Gather = lambda own: [own]) -> Throughput:
        """Return the rates since the last reset, and reset.

        compute_s: seconds that this rank computed. gather: gathers the numbers of all ranks, in rank order.
        """
        elapsed = max(self._clock() - self._begun - self._paused_s, 1e-9)
        by_rank = np.array(gather([self._samples, self._tokens, self._flops, compute_s, self._wait_s]))
        samples, tokens, flops, _, wait_s = by_rank.sum(0).tolist()
        num_ranks, step_s = len(by_rank), elapsed / self._steps if self._steps else math.nan
        tflops = flops / num_ranks / elapsed / 1e12
        result = Throughput(
            step_s=step_s,
            samples_per_s=samples / elapsed,
            tokens_per_s=tokens / elapsed,
            tflops=tflops,
            mfu=tflops / self._peak if 0 <= tflops <= self._peak else math.nan,
            data_wait=min(wait_s / num_ranks / elapsed, 1.0),
            ranks=rank_times(by_rank[:, 3:] / max(self._steps, 1), step_s) if num_ranks > 1 else {},
        )
        self._reset()
        return result

    def _reset(self) -> None:
        self._begun = self._clock()
        self._steps = 0
        self._samples = self._tokens = self._flops = self._wait_s = self._paused_s = 0.0


def memory_bytes(device: torch.device) -> int:
    """Memory of this rank: the peak of allocated tensors on a GPU, the current resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


# Published rates without sparsity: pattern of the device name → (bfloat16 and float16 with float32 accumulation, TF32,
# float32). The first matching pattern counts. Devices without a rate (None) or a pattern are measured.
_DATA_SHEETS: tuple[tuple[str, tuple[float, float | None, float | None]], ...] = (
    (r"\bB200", (2250, None, None)),
    (r"H100 NVL", (835, None, None)),
    (r"H[18]00 PCIe", (756, 378, 51)),
    (r"(GH200|H200|H100|H800)(?! NVL)", (989, 494.5, 67)),
    (r"A[18]00", (312, 156, 19.5)),
    (r"L40S", (362, 183, 91.6)),
    (r"A40\b", (149.7, 74.8, 37.4)),
    (r"A30\b", (165, 82, 10.3)),
    (r"A10\b", (125, 62.5, 31.2)),
    (r"V100-SXM", (125, 15.7, 15.7)),  # has no TF32
)


def data_sheet_tflops(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Published peak of the GPU ``name``, else None. ``tf32``: float32 products run on tensor cores in TF32."""
    found = (rates for pattern, rates in _DATA_SHEETS if re.search(pattern, name, re.IGNORECASE))
    half, tensor_float, single = next(found, (None, None, None))
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: tensor_float if tf32 else single}
    return rates.get(dtype)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak of one device for matrix products of ``dtype``, from the data sheet of a known GPU.

    Returns TFLOPS (10^12 operations per second), and the source of the number. Other devices are measured in less than
    a second: the rate that a matrix product reaches at present with torch's threads. Call it when a run starts, because
    it waits for the device.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = data_sheet_tflops(name, dtype, tf32=torch.backends.cuda.matmul.allow_tf32)
        if known is not None:
            return known, f"data sheet of {name}"
    name = str(dtype).removeprefix("torch.")
    return _measure(device, dtype), f"measured with {name} matrix products on this {device.type}"


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate over products of a size that keeps the device busy."""
    size = 8192 if device.type == "cuda" else 512  # in bfloat16 a CPU may do 1 GFLOP/s
    left = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer("left @ left", globals={"left": left}, num_threads=torch.get_num_threads())
    return 2.0 * size**3 / min(timer.blocked_autorange(min_run_time=0.1).times) / 1e12


class Profiler(ExitStack):
    """Traces the iterations [profile_step_start, profile_step_end) into ``directory``/trace-rank<rank>.json.gz.

    Use it as a context manager and call ``step`` when each iteration begins. A run that ends inside the window writes
    the trace so far; a run that resumes inside it starts tracing at once. On a GPU, cudaProfilerStart and
    cudaProfilerStop enclose the window, with one NVTX range per iteration: ``nsys profile
    --capture-range=cudaProfilerApi`` records it.
    """

    def __init__(self, directory: Path, args: TrainerArgs, rank: int = 0) -> None:
        super().__init__()
        self.trace_file = Path(directory) / f"trace-rank{rank}.json.gz"
        self._window = range(args.profile_step_start, args.profile_step_end if args.profile else 0)
        self._profile: Optional[profile] = None
        self._last: Optional[int] = None
        self.callback(self._warn_of_nothing)
        self._tracing, self._iteration = (self.enter_context(ExitStack()) for _ in range(2))

    def step(self, iteration: int) -> None:
        """Start, continue or stop the trace. Call it when ``iteration`` begins."""
        self._iteration.close()
        self._last = iteration
        if iteration not in self._window:
            self._tracing.close()
            return
        if self._profile is None:
            self._start()
        else:
            self._profile.step()
        if torch.cuda.is_available():
            self._iteration.enter_context(torch.cuda.nvtx.range(f"iteration {iteration}"))

    def _warn_of_nothing(self) -> None:
        if self._window and not self.trace_file.exists():
            first, last = self._window.start, self._window.stop
            log.warning("no profile: the run ended (at %s) outside of [%d, %d)", self._last, first, last)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            self._tracing.callback(torch.cuda.cudart().cudaProfilerStop)
        self._profile = self._tracing.enter_context(profile(activities=activities, on_trace_ready=self._write))

    def _write(self, traced: profile) -> None:
        self.trace_file.parent.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(self.trace_file))
        log.info("profile written: %s", self.trace_file)
