import os
import time

import pytest

from tests.distributed.launch import Launch, RankFailure, run_ranks


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")
    time.sleep(600)


def sleep_forever() -> None:
    time.sleep(600)


def test_the_failing_rank_is_named_and_the_others_are_not_waited_for() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2") as failure:
        run_ranks(2, fail_on_rank_one)
    assert failure.value.rank == 1
    assert "rank one is unwell" in failure.value.stderr


def test_a_launch_that_hangs_is_ended() -> None:
    with pytest.raises(RankFailure, match="still running"):
        run_ranks(Launch(1, timeout_s=2), sleep_forever)
