"""Saving for a long time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

SAVES, KEPT = 500, 3
SETTLED = 100  # saves after which memory is measured first: until then allocators and caches fill


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_many_saves_leave_the_last_ones_and_no_memory(tmp_path: Path, background: bool) -> None:
    asked = {"saves": SAVES, "keep": KEPT, "background": background, "directory": str(tmp_path / "checkpoints")}
    (told,) = run_ranks("tests.reliability.cases:many_saves", 1, 240, **asked)
    fewest, most, looked = told["seen"]
    print(f"{SAVES} saves in {told['seconds']:.1f} s, looked {looked} times, saw {fewest} to {most} commits")
    assert looked > SAVES / 2 and fewest >= 2 and most <= KEPT + 1
    growth = max(told["memory"][SETTLED:]) / told["memory"][SETTLED] - 1
    print(f"memory grew by {growth:.2%}")
    assert growth < 0.05
    assert told["names"] == [*(f"iteration_{SAVES - back:08d}" for back in (2, 1, 0)), "latest"]
