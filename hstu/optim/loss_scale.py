"""What a float16 run's loss is multiplied by, so that its gradients do not vanish, and how that follows overflows."""

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

    GradScaler itself learns of an overflow when an optimizer steps, and rank by rank. Here sharded tables are updated
    before that, inside backward, so the step's check (hstu.pipeline.finite) has to know on all ranks and before: the
    host then decides, and the scale is a number that no device is asked for.
    """

    def __init__(self, args: PrecisionArgs) -> None:
        self.is_dynamic = args.loss_scale in (None, "dynamic")
        self.value = INITIAL if self.is_dynamic else float(args.loss_scale or 0)
        self._growth_interval = args.growth_interval
        self._steps_without_overflow = 0
        self._skipped = 0

    @property
    def can_shrink(self) -> bool:
        """Whether a step whose gradients overflow may be skipped: there is a lower scale to go on with."""
        return self.is_dynamic and self.value > LOWEST

    def skip(self) -> None:
        """After a step that was skipped; only where the scale ``can_shrink``."""
        self.value = max(self.value / FACTOR, LOWEST)
        self._steps_without_overflow = 0
        self._skipped += 1

    def proceed(self) -> None:
        """After a step that was taken."""
        self._steps_without_overflow += 1
        if self.is_dynamic and self._steps_without_overflow >= self._growth_interval:
            self.value = min(self.value * FACTOR, HIGHEST)
            self._steps_without_overflow = 0

    def take_skipped(self) -> int:
        """How many steps were skipped since this was asked last."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "value": self.value,
            "steps_without_overflow": self._steps_without_overflow,
            "skipped": self._skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore ``state``; a scale that the configuration fixes stays."""
        if self.is_dynamic:
            self.value = state["value"]
        self._steps_without_overflow = state["steps_without_overflow"]
        self._skipped = state["skipped"]
