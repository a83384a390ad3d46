from pathlib import Path

import pytest

from tests.reliability.second_starts import beside_a_live_run, together


@pytest.mark.slow
def test_a_second_start_is_refused_and_does_not_harm_the_live_run(tmp_path: Path) -> None:
    assert beside_a_live_run(tmp_path, starts=2) == {"refused": 2, "live run harmed": 0, "live run ended well": 1}


@pytest.mark.slow
def test_of_two_runs_that_start_together_one_trains(tmp_path: Path) -> None:
    assert together(tmp_path, pairs=1) == {"one of two trained": 1}
