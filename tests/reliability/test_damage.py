"""A changed byte of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.manifest import MANIFEST
from tests.distributed.launch import run_ranks

FLIPS = 100


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    directory = str(tmp_path_factory.mktemp("flipped"))
    return run_ranks("tests.reliability.cases:flipped_bytes", 2, 120, directory=directory, number=FLIPS, seed=3)


def test_a_byte_changed_anywhere_is_refused_on_all_ranks_naming_the_file(ranks: list[list[dict[str, Any]]]) -> None:
    *flips, _ = ranks[0]
    assert len(flips) == FLIPS
    for told in flips:
        assert told["file"] in told["refusal"] and "damaged" in told["refusal"]
    assert [told["refusal"] for told in ranks[1][:-1]] == [told["refusal"] for told in flips]
    changed = {Path(told["file"]).name for told in flips}
    assert changed >= {MANIFEST, "progress.json", "operative.gin", ".metadata", "rng_rank0.pt", "__1_0.distcp"}


def test_auto_then_falls_back_to_the_one_before_with_a_warning(ranks: list[list[dict[str, Any]]]) -> None:
    for rank in ranks:
        *flips, last = rank
        for told in flips:
            assert (told["auto"], told["as_saved"]) == (2, True)
            (warning,) = told["warnings"]
            assert told["file"] in warning and "Trying the one before" in warning
        assert last["in_the_end"] == 4, "undamaged, it is taken again"
