"""What happens to rows that cannot be used: the first one ends the run, or they are skipped, counted and capped."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

from hstu.config.errors import DataError

_log = logging.getLogger(__name__)

Policy = Literal["raise", "skip"]


@dataclass
class BadRows:
    """Counts rows that cannot be used. ``limit``: with "skip", more than this many end the run all the same."""

    policy: Policy
    limit: int
    before: int = 0
    """Rows that earlier stages have skipped."""
    counts: dict[str, int] = field(default_factory=dict)
    """Why -> rows."""

    @property
    def total(self) -> int:
        """Rows skipped so far."""
        return self.before + sum(self.counts.values())

    def add(self, number: int, why: str, place: str, detail: str) -> None:
        """Notes ``number`` rows; ``place`` and ``detail`` are the first one's. DataError unless they may be skipped."""
        if not number:
            return
        more = f" ({number:,} such rows)" if number > 1 else ""
        if self.policy == "raise":
            raise DataError(
                f"{place}: {detail}{more}. Correct or remove it, or skip such rows with --bad_row_policy skip"
            )
        self.counts[why] = self.counts.get(why, 0) + number
        if self.total > self.limit:
            raise DataError(
                f"{place}: {detail}{more}. That makes {self.total:,} bad rows, more than --max_bad_rows {self.limit:,}"
            )
        _log.warning("skipped: %s: %s%s", place, detail, more)
