"""What is due after a step: logs, evaluations and checkpoints, every so many iterations, epochs or minutes."""

import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from hstu.config.args.trainer import split_interval
from hstu.pipeline.finite import FiniteCheck


class Intervals:
    """An interval has passed when a step takes iterations, epochs or minutes across one of its multiples.

    Epochs follow from the position in the data. Minutes are those of the run on rank 0, with its evaluations and
    without the time between a stop and a resume. The finite check of a step carries what they make due to the other
    ranks, so that all ranks act after the same step, on GPUs after the next one.
    """

    def __init__(self, intervals: Mapping[str, int | str | None], check: FiniteCheck, is_main: bool) -> None:
        """``intervals``: name → value of a TrainerArgs option. None or 0: never."""
        self._every = {name: split_interval(value) for name, value in intervals.items() if value}
        self._timed = [name for name, (_, unit) in self._every.items() if unit == "min"]
        self._check, self._is_main = check, is_main
        self._minutes, self._resumed_minutes, self._resumed_at = 0.0, 0.0, time.monotonic()
        self.due: set[str] = set()
        """Names of the intervals that the last step has completed."""

    @property
    def has_state(self) -> bool:
        """Whether something does not follow from the iteration alone."""
        return any(unit != "iteration" for _, unit in self._every.values())

    def before_step(self) -> None:
        """Let the check of the next step carry which intervals of minutes have passed."""
        before, self._minutes = self._minutes, self._resumed_minutes + (time.monotonic() - self._resumed_at) / 60
        self._check.flags = [
            self._is_main and _crosses(before, self._minutes, self._every[name][0]) for name in self._timed
        ]

    def after_step(self, iteration: int, epochs_before: Fraction, epochs: Fraction) -> None:
        """Set ``due``. ``epochs``: passes over the data so far, before and after the step."""
        ends: dict[str, tuple[float | Fraction, float | Fraction]]
        ends = {"iteration": (iteration - 1, iteration), "epoch": (epochs_before, epochs), "min": (0, 0)}
        self.due = {name for name, (number, unit) in self._every.items() if _crosses(*ends[unit], number)}
        self.due |= {name for name, passed in zip(self._timed, self._check.pop_flags(), strict=False) if passed}

    def resume(self, iteration: int) -> None:
        """Set what the step before ``iteration`` made due, after ``load_state_dict`` if there was a state."""
        for name, (number, unit) in self._every.items():
            if unit == "iteration":
                (self.due.add if iteration % number == 0 else self.due.discard)(name)

    def may_be_due(self, name: str, iteration: int) -> bool:
        """Whether ``name`` is due after an iteration to come, or may be: epochs and minutes are known only after it."""
        number, unit = self._every[name]
        return unit != "iteration" or iteration % number == 0

    def iterations(self, name: str, per_epoch: int, step_s: float) -> float | None:
        """Return the estimated iterations between two times at which ``name`` is due; None: never."""
        if name not in self._every:
            return None
        number, unit = self._every[name]
        return max(1.0, float(number) * {"iteration": 1.0, "epoch": per_epoch, "min": 60 / max(step_s, 1e-9)}[unit])

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON: minutes up to the last step, and what it made due."""
        return {"minutes": self._minutes if self._timed else 0.0, "due": sorted(self.due)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self._minutes = self._resumed_minutes = state["minutes"]
        self._resumed_at, self.due = time.monotonic(), {*state["due"]} & self._every.keys()


def _crosses(before: float | Fraction, after: float | Fraction, number: Fraction) -> bool:
    return after // number > before // number
