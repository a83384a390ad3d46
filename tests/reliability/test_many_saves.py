"""Saving for a long time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.reliability.cases import BEST

KEPT = 3
SETTLED = 100  # saves after which memory is measured first: until then allocators and caches fill


def save_and_look(directory: Path, saves: int, background: bool) -> dict[str, Any]:
    """One rank saves, the best early on; checks what is seen meanwhile and left in the end."""
    asked = {"saves": saves, "keep": KEPT, "background": background, "directory": str(directory / "checkpoints")}
    (told,) = run_ranks("tests.reliability.cases:many_saves", 1, 240, **asked)
    fewest, most, looked = told["seen"]
    print(f"{saves} saves in {told['seconds']:.1f} s, looked {looked} times, saw {fewest} to {most} commits")
    assert looked > saves / 2 and fewest >= 2 and most <= KEPT + 2
    last = [f"iteration_{saves - back:08d}" for back in (2, 1, 0)]
    assert told["names"] == ["best", f"iteration_{BEST:08d}", *last, "latest"]
    return told


@pytest.mark.parametrize("background", [False, True])
def test_the_best_stays_beside_the_last_ones(tmp_path: Path, background: bool) -> None:
    save_and_look(tmp_path, 12, background)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_five_hundred_saves_leave_no_memory(tmp_path: Path, background: bool) -> None:
    told = save_and_look(tmp_path, 500, background)
    growth = max(told["memory"][SETTLED:]) / told["memory"][SETTLED] - 1
    print(f"memory grew by {growth:.2%}")
    assert growth < 0.05
