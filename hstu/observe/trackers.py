"""Further destinations of the numbers in metrics.jsonl: TensorBoard files and Weights & Biases."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hstu.base.errors import ConfigError

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A destination of scalars. Its packages are imported on construction, so that other runs do not wait for them."""

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """Numbers by name ("train/loss", "valid/AUC")."""

    def close(self, failed: bool) -> None:
        """Finish writing. ``failed``: whether the run ended with an error."""


class TensorBoard:
    """Event files in ``directory``."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(directory))

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)
        self._events.flush()

    def close(self, failed: bool) -> None:
        """See Tracker."""
        self._events.close()


class WeightsAndBiases:
    """A run of ``project`` with the name of the run's ``directory`` and its configuration.

    A resumed run continues the run of the project, whose id is kept in ``directory``/wandb_id.txt. Numbers are plotted
    over "iter", so that repeated iterations may be sent again.

    Raises ConfigError if the package is missing or cannot start (no account, no network).
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            from wandb import Settings, init
        except ImportError as error:
            raise ConfigError(
                f"TrainerArgs.wandb_project = {project!r} needs the package wandb ({error}): "
                "pip install 'hstu[wandb]', or remove the option"
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
        self._broken = False

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """See Tracker. A service that fails does not end training: after a warning nothing more is sent."""
        if self._broken:
            return
        try:
            self._run.log({"iter": iteration, **values})
        except Exception as error:
            self._broken = True
            log.warning("Weights & Biases failed and gets no more numbers; metrics.jsonl has all of them: %s", error)

    def close(self, failed: bool) -> None:
        """See Tracker. Waits until everything has been sent."""
        if self._broken:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            log.warning("Weights & Biases may lack the last numbers; metrics.jsonl has all of them: %s", error)
