"""The learning-rate multiplier as a pure function of iteration and epoch."""

from __future__ import annotations

import math

from hstu.config.args import LRScheduleArgs


class Schedule:
    """One multiplier for all learning rates, those of the dense part and of the tables."""

    def __init__(self, args: LRScheduleArgs) -> None:
        self.args = args

    def multiplier(self, iteration: int, total_iters: int, epoch: int, iters_per_epoch: int) -> float:
        """Multiplier for the step that starts at ``iteration`` (0-based) of ``total_iters``, in ``epoch`` (0-based).

        Warm-up is linear from warmup_start at iteration 0 to 1 at the first iteration after it. The decay follows. With
        by_epoch, all steps of an epoch have the multiplier of iteration ``epoch * iters_per_epoch``, its first one.
        """
        warmup = self._warmup_iters(total_iters)
        position = epoch * iters_per_epoch if self.args.by_epoch else iteration
        if position < warmup:
            return self.args.warmup_start + (1.0 - self.args.warmup_start) * position / warmup
        if self.args.schedule == "step":
            return self._step_decay(epoch if self.args.by_epoch else iteration)
        return self._decay(position - warmup, self._decay_iters(total_iters, warmup))

    def _warmup_iters(self, total_iters: int) -> int:
        if self.args.warmup_ratio is not None:
            return round(self.args.warmup_ratio * total_iters)
        return self.args.warmup_iters or 0

    def _decay_iters(self, total_iters: int, warmup: int) -> int:
        if self.args.decay_ratio is not None:
            return max(1, round(self.args.decay_ratio * total_iters))
        return self.args.decay_iters or max(1, total_iters - warmup)

    def _step_decay(self, position: int) -> float:
        passed = sum(position >= milestone for milestone in self.args.milestones)
        return max(self.args.min_ratio, self.args.decay_factor**passed)

    def _decay(self, elapsed: int, decay_iters: int) -> float:
        floor, progress = self.args.min_ratio, min(1.0, elapsed / decay_iters)
        match self.args.schedule:
            case "linear":
                return 1.0 - (1.0 - floor) * progress
            case "cosine":
                return _cosine(progress, floor)
            case "cosine_restarts":
                return _cosine(elapsed % decay_iters / decay_iters, floor)
            case "exponential":
                return max(floor, self.args.decay_factor**progress)
            case _:
                return 1.0


def _cosine(progress: float, floor: float) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
