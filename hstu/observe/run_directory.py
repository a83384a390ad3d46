"""The directory of a run, TensorBoard and Weights & Biases. Only the main rank writes; other ranks do nothing."""

import contextlib
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Optional, TextIO

from hstu.base.errors import ConfigError, UserError
from hstu.base.files import DirectoryLock, remove, replace_text, unused
from hstu.observe.plots import draw_curves
from hstu.observe.records import EvalRecord, TrainRecord, plain, to_line

log = logging.getLogger(__name__)

_FILES = (
    "run.json", "operative*.gin", "metrics.jsonl", "summary.json", "curves.png", "log.txt", "tensorboard",
    "trace-rank*.json.gz",
)  # fmt: skip
"""Files that a run writes into its directory."""
_DRAWING_S = 15.0  # launchers kill a run 30 s after SIGTERM


def default_path(source_files: Sequence[str]) -> Path:
    """``runs/<last gin file>-<time>``, made unique by a number. Call it on one rank."""
    path = Path("runs") / f"{run_name(source_files)}-{time.strftime('%Y%m%d-%H%M%S')}"
    return unused(path.parent, f"{path.name}-{{}}", first=2) if path.exists() else path


def run_name(source_files: Sequence[str]) -> str:
    """Name of the last gin file without its suffix; "run" if there is none."""
    return Path(source_files[-1]).stem if source_files else "run"


class RunDirectoryFailure(UserError):
    """The directory cannot be written any more, because the disk is full or permissions are lost."""


@dataclass(eq=False)
class RunDirectory:
    """Writes operative.gin at once, metrics.jsonl during the run, summary.json and curves.png at its end. ``path`` is
    created if absent, and locked until ``close``.

    Args:
        identity: content of run.json, which names the run. Empty: no such file.
        continues: resume the run in ``path``: add a "resumed" line to metrics.jsonl, and keep an operative.gin that
            differs from ``config_text`` as operative-1.gin, operative-2.gin, …. Otherwise move the files of an earlier
            run to ``path``/previous-1, previous-2, …, and store that directory in ``earlier``.
        config: shown by Weights & Biases.

    Raises ConfigError if the directory cannot be written or is in use, or if Weights & Biases cannot start;
    RunDirectoryFailure if the directory cannot be written later.
    """

    path: Path
    config_text: str
    is_main: bool = True
    _: KW_ONLY
    identity: str = ""
    continues: bool = False
    task_names: Sequence[str] = ()
    tensorboard: bool = False
    wandb_project: Optional[str] = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_file = self.path / "log.txt" if self.is_main else None
        self.metrics_file = self.path / "metrics.jsonl"
        """Which records.py reads."""
        self.earlier: Optional[Path] = None
        self._metrics: Optional[TextIO] = None
        self._trackers: list[TensorBoard | WeightsAndBiases] = []
        self._opened = contextlib.ExitStack()
        self._failed = True
        self._best: Optional[int] = None
        if not self.is_main:
            return
        try:
            self._open()
        except OSError as error:
            raise ConfigError(
                f"TrainerArgs.output_dir: the directory '{self.path}' cannot be written: {error.strerror or error}. "
                "Free space or permissions there, or give another directory: TrainerArgs.output_dir = '<directory>'."
            ) from error
        if self.tensorboard:
            self._trackers.append(TensorBoard(self.path / "tensorboard"))
        if self.wandb_project is not None:
            self._trackers.append(WeightsAndBiases(self.wandb_project, self.path, self.config))

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Append a record to metrics.jsonl, flush the file, and send the numbers to the trackers."""
        self._append(record.as_json())
        for tracker in self._trackers:
            tracker.write(record.scalars(), record.iteration)

    def write_summary(self, *, status: str, **entries: Any) -> None:
        """Write summary.json atomically. ``entries``: anything that JSON can hold."""
        if not self.is_main:
            return
        self._failed = status == "failed"
        self._best = entries.get("best", {}).get("iter")
        try:
            replace_text(self.path / "summary.json", json.dumps(plain({"status": status, **entries}), indent=2) + "\n")
        except OSError as error:
            raise _failure(self.path / "summary.json", error) from error

    def draw_curves(self) -> Optional[Path]:
        """Draw curves.png from metrics.jsonl and return its path. If that fails or takes 15 s, log why; return None."""
        if not self.is_main:
            return None

        def give_up(*_: object) -> None:
            raise TimeoutError(f"it takes longer than {_DRAWING_S:g} s")

        try:
            signal.signal(signal.SIGALRM, give_up)
            signal.setitimer(signal.ITIMER_REAL, _DRAWING_S)
            return draw_curves(self.metrics_file, self.path / "curves.png", self.task_names, self._best)
        except Exception as error:  # of many types; the run itself is complete
            log.warning("%s is not drawn: %s. metrics.jsonl has all numbers.", self.path / "curves.png", error)
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def close(self) -> None:
        """Close the files. May be called twice."""
        while self._trackers:
            self._trackers.pop().close(self._failed)
        self._opened.close()

    def discard(self) -> None:
        """Close and undo the changes of this start, because the run cannot begin. A resumed run stays as it is."""
        self.close()
        if not self.is_main or self.continues:
            return
        for path in (path for pattern in _FILES for path in self.path.glob(pattern)):
            remove(path)
        if self.earlier is not None:
            for path in self.earlier.iterdir():
                path.rename(self.path / path.name)
            self.earlier.rmdir()
        with contextlib.suppress(OSError):  # the directory is not empty
            self.path.rmdir()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._opened.callback(DirectoryLock(self.path, "TrainerArgs.output_dir").release)
        files = [path for pattern in _FILES for path in self.path.glob(pattern)]
        if files and not self.continues:
            self.earlier = unused(self.path, "previous-{}")
            self.earlier.mkdir()
            for path in files:
                path.rename(self.earlier / path.name)
        if self.identity:
            replace_text(self.path / "run.json", self.identity)
        operative = self.path / "operative.gin"
        changed = operative.exists() and operative.read_text(encoding="utf-8") != self.config_text
        if changed:
            os.replace(operative, unused(self.path, "operative-{}.gin"))
        replace_text(operative, self.config_text)
        # Readers would mistake the summary of an earlier attempt for this attempt's summary.
        (self.path / "summary.json").unlink(missing_ok=True)
        resumed = self.metrics_file.exists() and self.metrics_file.stat().st_size > 0
        self._metrics = self._opened.enter_context(self.metrics_file.open("a", encoding="utf-8"))
        if resumed:
            if not self.metrics_file.read_bytes().endswith(b"\n"):  # a kill has cut off the last line
                self._metrics.write("\n")
            at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._append({"kind": "resumed", "at": at, "configuration_changed": changed})

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(to_line(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise _failure(self.metrics_file, error) from error


def _failure(path: Path, error: OSError) -> RunDirectoryFailure:
    return RunDirectoryFailure(f"the run's directory cannot be written: {path}: {error.strerror or error}")


class TensorBoard:
    """Writes event files to ``directory``. Imports the package late, so that other runs do not wait for it."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(directory))

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """Write ``values``, named like "train/loss" and "valid/AUC"."""
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)
        self._events.flush()

    def close(self, failed: bool) -> None:
        """Finish writing. ``failed``: whether the run ended with an error."""
        self._events.close()


class WeightsAndBiases:
    """Logs to a run of ``project``, which a resumed run continues. Raises ConfigError if it cannot start.

    Its id is in ``directory``/wandb_id.txt. Numbers are plotted over "iter", because resumed runs repeat iterations.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            from wandb import Settings, init
        except ImportError as error:
            raise ConfigError(
                f"TrainerArgs.wandb_project = {project!r} needs the package wandb ({error}): "
                "pip install 'hstu-trainer[wandb]', or remove the option"
            ) from error
        identity = directory / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = init(
                project=project,
                dir=str(directory),
                name=directory.name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                config=dict(config),
                settings=Settings(console="off"),  # log.txt has the output
            )
        except Exception as error:  # of any type; the user must see it before training
            why = str(error).rstrip(".")
            raise ConfigError(
                f"TrainerArgs.wandb_project = {project!r}: Weights & Biases cannot start: {why}. Log in with "
                "`wandb login`, set WANDB_MODE=offline to keep the numbers in the run's directory, or remove the option"
            ) from error
        self._run.define_metric("*", step_metric="iter")
        self._write: Callable[[dict[str, float]], None] = self._run.log

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """Send ``values``. If the service fails, log a warning and send nothing more; training continues."""
        self._try(lambda: self._write({"iter": iteration, **values}))

    def close(self, failed: bool) -> None:
        """Finish the run after everything has been sent. ``failed``: whether the run ended with an error."""
        self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:
            self._write = lambda _: None
            log.warning("Weights & Biases failed and gets no more numbers; metrics.jsonl has all of them: %s", error)
