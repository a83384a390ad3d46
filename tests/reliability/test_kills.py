"""Runs that are killed and started again. For all points: ``python -m tests.reliability.kills --points 100``."""

from pathlib import Path

import pytest

from tests.reliability.kills import Setting, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_killed_run_resumes_from_its_last_commit_and_ends_with_the_same_weights(
    store: str, tmp_path: Path, ranks: int, background: bool
) -> None:
    killed = list(outcomes(Setting(ranks, background, store), 3, seed=11, folder=tmp_path))
    assert len(killed) == 3
    assert not [outcome for outcome in killed if outcome.problems]
