"""The directory of a run: its configuration, its metrics, its curves, its log.

Only the main rank has one on disk; on the others every method does nothing, so that callers need not ask.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Optional, Self, TextIO

from hstu.config.errors import ConfigError, UserError
from hstu.observe.records import EvalRecord, TrainRecord, to_line
from hstu.observe.trackers import TensorBoard, Tracker, WeightsAndBiases


def default_path(source_files: Sequence[str], root: Path | str = "runs", now: Optional[float] = None) -> Path:
    """``runs/<name of the last gin file>-<time>``, a directory that does not exist yet.

    Call it on one rank and hand the result to the others. ``now``: seconds since the epoch; None: this moment.
    """
    name = Path(source_files[-1]).stem if source_files else "run"
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    path = Path(root) / f"{name}-{stamp}"
    count = 1
    while path.exists():
        count += 1
        path = Path(root) / f"{name}-{stamp}-{count}"
    return path


class RunDirectoryFailure(UserError):
    """The run's directory could be written when the run began and cannot any more: a full disk, lost permissions."""


class RunDirectory:
    """Writes operative.gin at once, metrics.jsonl as the run goes, summary.json and curves.png at its end.

    path: made if absent. A directory that already holds a run is continued: its metrics get a "resumed" line and
    new lines after it, and an operative.gin that differs from ``config_text`` is kept as operative-1.gin, ….
    is_main: False writes nothing at all. tensorboard: also write event files to ``path/tensorboard``. wandb_project:
    also send the numbers there, with ``config``.

    Raises ConfigError if the directory cannot be written or Weights & Biases cannot begin, and RunDirectoryFailure if
    it cannot be written later on.
    """

    def __init__(
        self,
        path: Path | str,
        config_text: str,
        is_main: bool = True,
        *,
        tensorboard: bool = False,
        wandb_project: Optional[str] = None,
        config: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.path = Path(path)
        self.is_main = is_main
        self.resumed = False
        self._metrics: Optional[TextIO] = None
        self._trackers: list[Tracker] = []
        self._failed = True
        if not is_main:
            return
        try:
            self._open(config_text)
        except OSError as error:
            raise ConfigError(
                f"TrainerArgs.output_dir: the directory '{path}' cannot be written: {error.strerror or error}. "
                "Free space or permissions there, or give another directory: TrainerArgs.output_dir = '<directory>'."
            ) from error
        if tensorboard:
            self._trackers.append(TensorBoard(self.path / "tensorboard"))
        if wandb_project is not None:
            self._trackers.append(WeightsAndBiases(wandb_project, self.path, config))

    @property
    def log_file(self) -> Optional[Path]:
        """Where the log goes; None on ranks that are not the main one."""
        return self.path / "log.txt" if self.is_main else None

    @property
    def metrics_file(self) -> Path:
        """metrics.jsonl, see records.py for reading it."""
        return self.path / "metrics.jsonl"

    def write_train(self, record: TrainRecord) -> None:
        """Append what training did; the line is in the file when this returns."""
        self._append(record.as_json())
        self._track(record.scalars(), record.iteration)

    def write_eval(self, record: EvalRecord) -> None:
        """Append the metrics of an evaluation; the line is in the file when this returns."""
        self._append(record.as_json())
        self._track(record.scalars(), record.iteration)

    def write_summary(
        self,
        *,
        status: str,
        iterations: int,
        best_metrics: Mapping[str, Any],
        last_metrics: Mapping[str, Any],
        throughput: Mapping[str, float],
        seconds: float,
        **more: Any,
    ) -> None:
        """Write summary.json, whole or not at all. ``more``: further entries, as JSON can hold them."""
        if not self.is_main:
            return
        self._failed = status == "failed"
        summary = {
            "status": status,
            "iterations": iterations,
            "best_metrics": best_metrics,
            "last_metrics": last_metrics,
            "throughput": throughput,
            "seconds": seconds,
            **more,
        }
        # Through strict JSON and back: nan becomes null here as in metrics.jsonl.
        text = json.dumps(json.loads(to_line(summary)), indent=2) + "\n"
        try:
            _replace(self.path / "summary.json", text)
        except OSError as error:
            raise _failure(self.path / "summary.json", error) from error

    def draw_curves(self) -> Optional[Path]:
        """Draw curves.png from metrics.jsonl; its path, or None where there is nothing to draw yet."""
        if not self.is_main:
            return None
        from hstu.observe.plots import draw_curves

        return draw_curves(self.metrics_file, self.path / "curves.png")

    def close(self) -> None:
        """Close the files; calling it twice does no harm."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        while self._trackers:
            self._trackers.pop().close(self._failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _open(self, config_text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        operative = self.path / "operative.gin"
        changed = operative.exists() and operative.read_text(encoding="utf-8") != config_text
        if changed:
            os.replace(operative, _unused(self.path, "operative-{}.gin"))
        _replace(operative, config_text)
        # The summary of an earlier attempt would be taken for this one's.
        (self.path / "summary.json").unlink(missing_ok=True)
        self.resumed = self.metrics_file.exists() and self.metrics_file.stat().st_size > 0
        torn = self.resumed and not self.metrics_file.read_bytes().endswith(b"\n")
        self._metrics = self.metrics_file.open("a", encoding="utf-8")
        if torn:  # the last line was cut off by a kill; do not write into it
            self._metrics.write("\n")
        if self.resumed:
            at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._append({"kind": "resumed", "at": at, "configuration_changed": changed})

    def _track(self, values: Mapping[str, float], iteration: int) -> None:
        for tracker in self._trackers:
            tracker.write(values, iteration)

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(to_line(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise _failure(self.metrics_file, error) from error


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, finds either the old or the new one whole."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _failure(path: Path, error: OSError) -> RunDirectoryFailure:
    return RunDirectoryFailure(f"the run's directory cannot be written: {path}: {error.strerror or error}")


def _unused(directory: Path, pattern: str) -> Path:
    count = 1
    while (directory / pattern.format(count)).exists():
        count += 1
    return directory / pattern.format(count)
