"""Full and read-only disks, checkpoints of other runs, a changed byte, and the order of fsyncs and renames.

After a power failure only synchronised data is sure to be on disk.
"""

import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import MANIFEST, DamagedCheckpoint, read_manifest
from hstu.checkpoint.load import load
from hstu.checkpoint.store import CheckpointStore
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from tests.distributed.failure_cases import run_apart
from tests.distributed.launch import EndedRank, Launch, run_cases, run_to_their_ends
from tests.distributed.pipeline_cases import digest
from tests.distributed.test_failures import read_records
from tests.distributed.toy import new_state, train_state
from tests.reliability.test_background import TIMEOUT_S, TRAINER, committed, run

Disk = Callable[[Path, str], None]


@pytest.fixture
def disk() -> Iterator[Disk]:
    """``disk(directory, options)`` mounts a tmpfs there."""
    mounted: list[Path] = []

    def mount(directory: Path, options: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("NEEDS THE RIGHT TO MOUNT: a small disk of its own")
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


def run_alone(store: str, output: Path, fault: str = "nothing", at: int = 0, **trainer: Any) -> EndedRank:
    (rank,) = run(1, store, output, fault, at, **trainer)
    assert "Traceback" not in rank.output, rank.output
    return rank


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_ends_the_run_and_keeps_the_last_commit(
    store: str, tmp_path: Path, disk: Disk, background: bool
) -> None:
    disk(tmp_path / "checkpoints", "size=700k")  # room for two
    rank = run_alone(store, tmp_path, ckpt_async=background, max_train_iters=1000)
    assert rank.exit_code == 1
    assert "error: cannot save " in rank.output and "/iteration_00000006: " in rank.output
    assert "[Errno 28] No space left on device" in rank.output and "free space or permissions there" in rank.output
    assert list(committed(tmp_path)) == [2, 4]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_file_in_place_of_the_directory_is_reported_before_training(store: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rank = run_alone(store, tmp_path, ckpt_save_dir=str(tmp_path / "file" / "checkpoints"))
    assert rank.exit_code == 2 and "iter  1" not in rank.output
    directory = tmp_path / "file" / "checkpoints"
    assert f"ckpt_save_dir: the directory '{directory}' cannot be written: Not a directory" in rank.output


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_ends_the_run(store: str, tmp_path: Path, disk: Disk) -> None:
    disk(tmp_path / "checkpoints", "size=2m")
    assert run_alone(store, tmp_path, max_train_iters=4).exit_code == 0
    remount = ["mount", "-o", "remount,ro", str(tmp_path / "checkpoints")]
    subprocess.run(remount, check=True)
    rank = run_alone(store, tmp_path, ckpt_load_dir="auto")
    assert rank.exit_code == 2 and "Read-only file system" in rank.output
    assert list(committed(tmp_path)) == [2, 4]


@pytest.mark.slow
def test_a_full_disk_under_the_run_directory_ends_the_run(store: str, tmp_path: Path, disk: Disk) -> None:
    disk(tmp_path / "run", "size=200k")
    rank = run_alone(store, tmp_path, "disk of the run full", 6, max_train_iters=9)
    assert rank.exit_code == 1
    assert f"error: the run's directory cannot be written: {tmp_path}/run" in rank.output
    assert "No space left on device" in rank.output
    assert list(committed(tmp_path))[:2] == [2, 4]


def test_checkpoints_of_another_run_are_not_touched_and_equal_later_ones_are_kept(store: str, tmp_path: Path) -> None:
    assert run_alone(store, tmp_path, max_train_iters=4).exit_code == 0
    before = committed(tmp_path)
    rank = run_alone(store, tmp_path, max_train_iters=4)
    assert rank.exit_code == 2
    assert "holds the checkpoints of another run (iteration_00000004, …), which are never overwritten" in rank.output
    assert committed(tmp_path) == before
    back = str(tmp_path / "checkpoints" / "iteration_00000002")
    assert run_alone(store, tmp_path, max_train_iters=6, ckpt_load_dir=back).exit_code == 0
    after = committed(tmp_path)
    assert list(after) == [2, 4, 6] and {iteration: after[iteration] for iteration in before} == before
    assert not list((tmp_path / "checkpoints").glob("set_aside*"))
    steps = [record["iter"] for record in read_records(tmp_path) if record["kind"] == "train"]
    assert steps == [*range(1, 5), *range(3, 7)]


@pytest.mark.parametrize(
    ("at", "code", "error"),
    [
        (0, 2, r"error: TrainerArgs.ckpt_save_dir: rank 1 cannot see what rank 0 writes to 'checkpoints'"),
        (4, 1, r"error: cannot save checkpoints/iteration_00000004: .* rank 0: it cannot see all of \S*, of"),
    ],
    ids=["from the start", "later"],
)
def test_a_host_with_a_checkpoint_directory_of_its_own_is_reported(
    store: str, tmp_path: Path, at: int, code: int, error: str
) -> None:
    ranks = run_to_their_ends(Launch(2, TIMEOUT_S), run_apart, at, store, str(tmp_path), trainer=TRAINER)
    assert [rank.exit_code for rank in ranks] == [code, code], ranks[0].output + ranks[1].output
    assert all(re.search(error, rank.output) and "Traceback" not in rank.output for rank in ranks), ranks[0].output
    assert list(committed(tmp_path)) == ([2] if at else [])
    left = [path.name for path in (tmp_path / "checkpoints").glob("*")]
    assert sorted(left) == (["iteration_00000002", "latest"] if at else [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """The directory in which two ranks have saved a checkpoint, and all their fsyncs and renames, sorted by time."""
    directory = tmp_path_factory.mktemp("synchronised") / "checkpoints"
    ranks = run_cases(2, {"save": partial(save_and_log_syncs, directory=directory)})
    return directory, sorted(operation for rank in ranks for operation in rank["save"])


def save_and_log_syncs(mesh: Mesh, directory: Path) -> list[tuple[float, str, str]]:
    """Save a checkpoint and return this rank's fsyncs and renames with their times, from one clock for all ranks."""
    state, store = new_state(mesh), CheckpointStore(directory, "", mesh)
    operations: list[tuple[float, str, str]] = []
    fsync = os.fsync

    def note_fsync(handle: int) -> None:
        fsync(handle)
        operations.append((time.monotonic(), "fsync", os.readlink(f"/proc/self/fd/{handle}")))

    def note_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            operations.append((time.monotonic(), "rename", str(arguments[0])))

    os.fsync = note_fsync  # type: ignore[assignment]
    sys.addaudithook(note_rename)
    store.claim()
    store.save(state)
    return operations


def test_every_byte_is_on_disk_before_the_final_rename(saved: tuple[Path, list[list[Any]]]) -> None:
    directory, operations = saved
    kinds = [(kind, Path(path)) for _, kind, path in operations]
    temporary, final = directory / ".writing_iteration_00000000", directory / "iteration_00000000"
    renamed = kinds.index(("rename", temporary))
    before = {path for kind, path in kinds[:renamed] if kind == "fsync"}
    assert before >= {temporary / name for name in (*read_manifest(final), MANIFEST, "tensors", ".")}
    manifest = kinds.index(("fsync", temporary / MANIFEST))
    assert all(("fsync", temporary / name) in kinds[:manifest] for name in read_manifest(final))


def test_the_rename_is_on_disk_before_latest_points_to_it(saved: tuple[Path, list[list[Any]]]) -> None:
    directory, operations = saved
    kinds = [(kind, Path(path)) for _, kind, path in operations]
    renamed = kinds.index(("rename", directory / ".writing_iteration_00000000"))
    pointed = kinds.index(("rename", directory / ".writing_latest"))
    assert ("fsync", directory) in kinds[renamed:pointed]
    assert ("fsync", directory) in kinds[pointed:]
    assert ("fsync", directory.parent) in kinds[:renamed], "the directory itself is new"


FLIPS = 30


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    directory = str(tmp_path_factory.mktemp("flipped"))
    flip = partial(flip_bytes, directory=directory, number=FLIPS, seed=3)
    return [rank["flip"] for rank in run_cases(Launch(2, timeout_s=120), {"flip": flip})]


def flip_bytes(mesh: Mesh, directory: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Change one byte of the newer of two checkpoints, ``number`` times; load it by name, then with "auto"."""
    state, store = new_state(mesh, optimizer="adam"), CheckpointStore(Path(directory), "auto", mesh)
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
