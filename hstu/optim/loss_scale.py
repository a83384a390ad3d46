"""The factor by which a float16 run multiplies its loss, so that small gradients do not vanish."""

from __future__ import annotations

from typing import Any

from hstu.config.args import PrecisionArgs

INITIAL = 65536.0
LOWEST = 1.0
FACTOR = 2.0
HIGHEST = 2.0**127
"""The largest power of two in float32."""


class LossScale:
    """The arithmetic of torch.amp.GradScaler, with the scale and its counters on the host.

    GradScaler detects an overflow when an optimizer steps, on each rank by itself. Sharded tables are updated earlier,
    inside backward, and all ranks must decide alike. The host therefore decides, by the step's finite check.
    """

    def __init__(self, args: PrecisionArgs) -> None:
        self.is_dynamic = args.loss_scale in (None, "dynamic")
        self.value = INITIAL if self.is_dynamic else float(args.loss_scale or 0)
        self._growth_interval = args.growth_interval
        self._steps_without_overflow = 0
        self._skipped_steps = 0

    @property
    def can_shrink(self) -> bool:
        """Whether a step whose gradients overflow may be skipped, because training can go on with a lower scale."""
        return self.is_dynamic and self.value > LOWEST

    def update(self, found_inf: bool) -> None:
        """Follow one step. ``found_inf``: its gradients overflowed and it was skipped, which needs ``can_shrink``."""
        if found_inf:
            self.value = max(self.value / FACTOR, LOWEST)
            self._steps_without_overflow = 0
            self._skipped_steps += 1
            return
        self._steps_without_overflow += 1
        if self.is_dynamic and self._steps_without_overflow >= self._growth_interval:
            self.value = min(self.value * FACTOR, HIGHEST)
            self._steps_without_overflow = 0

    def pop_skipped_steps(self) -> int:
        """Number of steps skipped since the last call."""
        skipped, self._skipped_steps = self._skipped_steps, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as JSON."""
        return {
            "value": self.value,
            "steps_without_overflow": self._steps_without_overflow,
            "skipped": self._skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``. A scale that the configuration fixes keeps its value."""
        if self.is_dynamic:
            self.value = state["value"]
        self._steps_without_overflow = state["steps_without_overflow"]
        self._skipped_steps = state["skipped"]
