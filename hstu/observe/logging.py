"""The log of a run on the terminal and in log.txt: handlers, line formats and a progress bar."""

import logging
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, TypeVar

from tqdm import tqdm

from hstu.base.errors import PrintableFormatter
from hstu.observe.records import EvalRecord, TrainRecord

_TEXT_WIDTH = 120 - len("12:34:56 ")
T = TypeVar("T")
_WAIT_SHOWN = 0.05
_PROGRESS_S = 10.0
progress_log = logging.getLogger("hstu.progress")


class _BesideProgressBar(logging.Handler):
    """Writes lines above a progress bar on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Looked up at each call, because a test or a notebook may replace the stream.
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def set_up_logging(rank: int = 0, log_file: Optional[Path] = None) -> logging.Logger:
    """Reconfigure the logger "hstu", the parent of all module loggers.

    Rank 0 logs INFO and above to standard output and appends to ``log_file``, if given, with dates and levels. Other
    ranks log only warnings, to standard error, with a ``[rank N]`` prefix.
    """
    logger = logging.getLogger("hstu")
    tear_down_logging()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: dict[logging.Handler, PrintableFormatter] = {}
    if rank != 0:
        handlers[logging.StreamHandler()] = PrintableFormatter(f"[rank {rank}] %(levelname)s %(message)s")
    else:
        handlers[_BesideProgressBar()] = _ConsoleFormatter("%(asctime)s %(shown_level)s%(message)s", "%H:%M:%S")
        if log_file is not None:
            dated = PrintableFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
            handlers[logging.FileHandler(log_file, encoding="utf-8")] = dated
    for handler, formatter in handlers.items():
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def quiet_libraries() -> None:
    """Silence warnings of TorchRec 1.6 to 1.8 and torch 2.11 to 2.13 that a user cannot act on."""
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torchrec\.distributed\.types")


def tear_down_logging() -> None:
    """Remove the handlers of ``set_up_logging`` and close their files."""
    logger = logging.getLogger("hstu")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


class _ConsoleFormatter(PrintableFormatter):
    """Shows the level only of warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        record.shown_level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return super().format(record)


def format_train(record: TrainRecord, total_iters: int, straggler: str | None = None) -> str:
    """One aligned line: tok/s of all ranks, MFU per rank, the time that the steps left take, data wait only from 5 %.

    With several tasks, their parts of the loss follow in further lines. ``straggler``: the slowest rank and its host,
    if the others wait for it.
    """
    width = len(str(total_iters))
    parts = [
        f"iter {record.iteration:>{width}}/{total_iters}",
        f"epoch {record.epoch:5.2f}",
        f"loss {record.loss:7.4f}",
        f"lr {record.lr:.1e}",
        *([] if record.grad_norm is None else [f"grad {record.grad_norm:.2g}"]),
        f"{tqdm.format_sizeof(record.tokens_per_s):>5} tok/s",
        f"MFU {_percent(record.mfu)}",
        f"{record.memory_bytes / 2**30:4.3g} GiB",
        f"ETA {format_seconds((total_iters - record.iteration) * record.step_s)}",
    ]
    if record.data_wait >= _WAIT_SHOWN:
        parts.append(f"wait {_percent(record.data_wait).strip()}")
    if not math.isfinite(record.mfu):
        parts.append("above peak")
    if record.skipped_steps:
        parts.append(f"{record.skipped_steps} skipped")
    if straggler is not None:
        parts.append(f"{straggler} +{_percent(record.ranks['slowest_excess']).strip()}")
    line = "  ".join(parts)
    line = line if len(line) <= _TEXT_WIDTH else " ".join(parts)
    losses = [f"loss/{task} {_metric(loss)}" for task, loss in record.task_losses.items()]
    return f"{line}\n{_wrapped('   ', losses)}" if losses else line


def format_eval(record: EvalRecord, seconds: float = math.nan) -> str:
    """Format the metrics of an evaluation that took ``seconds``, in lines that fit 120 columns."""
    parts = [f"{name} {_metric(value)}" for name, value in record.metrics.items()]
    if math.isfinite(seconds):
        parts.append(f"({format_seconds(seconds)})")
    return _wrapped(f"eval {record.split} at iter {record.iteration}", parts)


def _wrapped(first: str, parts: Iterable[str]) -> str:
    """``first`` and the parts, in lines that fit 120 columns."""
    lines = [first]
    for part in parts:
        if len(lines[-1]) + 2 + len(part) > _TEXT_WIDTH:
            lines.append("   ")
        lines[-1] += f"  {part}"
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``; ``?`` if unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Logs every 10 s how much of ``total`` is done, and the time left at the speed so far."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._begun = self._logged = time.monotonic()

    def update(self, done: int) -> None:
        """Log, if it is time, that ``done`` of the total is done."""
        now = time.monotonic()
        if done and now - self._logged >= _PROGRESS_S:
            self._logged, left_s = now, (now - self._begun) / done * (self._total - done)
            progress_log.info(f"{self._what}: {done:,} of {self._total:,}, ETA {format_seconds(left_s)}")

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield ``batches``, and update with their number so far."""
        for done, batch in enumerate(batches):
            self.update(done)
            yield batch


def progress_bar(total: int, mode: str = "auto", *, visible: bool = True, initial: int = 0) -> "tqdm[Any]":
    """A bar on standard error. ``mode``: "on", "off", or "auto" (on for terminals). ``visible``: True on one rank."""
    hidden = not visible or {"on": False, "off": True}.get(mode)  # None: hidden unless standard error is a terminal
    return tqdm(total=total, initial=initial, desc="train", dynamic_ncols=True, leave=False, disable=hidden)


def _percent(share: float) -> str:
    return f"{100 * share:3.0f}%" if math.isfinite(share) else " n/a"


def _metric(value: float) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "n/a"
