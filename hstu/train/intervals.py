"""What is due after a step: logs, evaluations and checkpoints, every so many iterations or epochs."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from hstu.config.args.trainer import split_interval


class Intervals:
    """An interval has passed when a step takes iterations or epochs across one of its multiples."""

    def __init__(self, intervals: Mapping[str, int | str | None]) -> None:
        """``intervals``: name → value of a TrainerArgs option. None or 0: never."""
        self._every = {name: split_interval(value) for name, value in intervals.items() if value}
        self.due: set[str] = set()
        """Names of the intervals that the last step has completed."""

    @property
    def has_state(self) -> bool:
        """Whether something does not follow from the iteration alone."""
        return any(unit != "iteration" for _, unit in self._every.values())

    def after_step(self, iteration: int, epochs_before: Fraction, epochs: Fraction) -> None:
        """Set ``due``. ``epochs``: passes over the data so far, before and after the step."""
        ends = {"iteration": (Fraction(iteration - 1), Fraction(iteration)), "epoch": (epochs_before, epochs)}
        self.due = {
            name for name, (number, unit) in self._every.items() if ends[unit][1] // number > ends[unit][0] // number
        }

    def resume(self, iteration: int) -> None:
        """Set what the step before ``iteration`` made due, after ``load_state_dict`` if there was a state."""
        for name, (number, unit) in self._every.items():
            if unit == "iteration":
                (self.due.add if iteration % number == 0 else self.due.discard)(name)

    def may_be_due(self, name: str, iteration: int) -> bool:
        """Whether ``name`` is due after an iteration to come, or may be: epochs are known only after it."""
        number, unit = self._every[name]
        return unit != "iteration" or iteration % number == 0

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON: what the last step made due."""
        return {"due": sorted(self.due)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self.due = {*state["due"]} & self._every.keys()
