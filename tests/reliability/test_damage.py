"""Loading a checkpoint in which one byte has changed."""

import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import MANIFEST, DamagedCheckpoint
from hstu.checkpoint.load import load
from hstu.checkpoint.store import CheckpointStore
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import digest
from tests.distributed.toy import new_state, train_state

FLIPS = 30


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    directory = str(tmp_path_factory.mktemp("flipped"))
    flip = partial(flip_bytes, directory=directory, number=FLIPS, seed=3)
    return [rank["flip"] for rank in run_cases(Launch(2, timeout_s=120), {"flip": flip})]


def flip_bytes(mesh: Mesh, directory: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Change one byte of the newer of two checkpoints, ``number`` times; load it by name, then with "auto"."""
    state, store = new_state(mesh, optimizer="adam"), CheckpointStore(directory, "auto", mesh)
    digests = {}
    for steps in (2, 2):
        train_state(state, mesh, steps)
        store.save(state)
        digests[state.iteration] = digest(state, mesh)
    newer = Path(directory) / f"iteration_{state.iteration:08d}"
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    rng, outcomes = random.Random(seed), []
    warnings = _Collected()
    logging.getLogger("hstu.checkpoint").addHandler(warnings)
    for index in range(number):
        # every file in turn, and between them one by size, because most bytes are tensors
        by_size = rng.choices(files, [path.stat().st_size for path in files])[0]
        path = files[index // 2 % len(files)] if index % 2 else by_size
        index_of_byte, difference = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        _change(path, index_of_byte, difference, mesh)
        try:
            load(newer, state, mesh)
            refusal = "loaded without an error"
        except DamagedCheckpoint as error:
            refusal = str(error)
        warnings.messages.clear()
        restored = store.restore(state)
        outcomes.append(
            {
                "file": str(path),
                "refusal": refusal,
                "auto": state.iteration if restored else None,
                "warnings": list(warnings.messages),
                "as_saved": digest(state, mesh) == digests.get(state.iteration),
            }
        )
        _change(path, index_of_byte, difference, mesh)  # undo the change
    outcomes.append({"in_the_end": store.restore(state) and state.iteration})
    return outcomes


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _change(path: Path, index: int, difference: int, mesh: Mesh) -> None:
    gather_objects(None, mesh.world_group)  # wait until all ranks have finished reading
    if mesh.is_main:
        content = bytearray(path.read_bytes())
        content[index] ^= difference
        path.write_bytes(content)
    gather_objects(None, mesh.world_group)


def test_any_changed_byte_is_an_error_on_all_ranks_that_names_the_file(ranks: list[list[dict[str, Any]]]) -> None:
    *flips, _ = ranks[0]
    assert len(flips) == FLIPS
    for outcome in flips:
        assert outcome["file"] in outcome["refusal"] and "damaged" in outcome["refusal"]
    assert [outcome["refusal"] for outcome in ranks[1][:-1]] == [outcome["refusal"] for outcome in flips]
    changed = {Path(outcome["file"]).name for outcome in flips}
    assert changed >= {MANIFEST, "progress.json", "operative.gin", ".metadata", "rng_rank0.pt", "__1_0.distcp"}


def test_auto_falls_back_to_the_previous_checkpoint_with_a_warning(ranks: list[list[dict[str, Any]]]) -> None:
    for rank in ranks:
        *flips, last = rank
        for outcome in flips:
            assert (outcome["auto"], outcome["as_saved"]) == (2, True)
            (warning,) = outcome["warnings"]
            assert outcome["file"] in warning and "Trying the previous one." in warning
        assert last["in_the_end"] == 4, "when it is undamaged, it is loaded again"
