"""Which checkpoint a path means, and that no tool takes the checkpoint of another run."""

import json
import shutil
from pathlib import Path

import pytest

from hstu.base.errors import DataError
from hstu.checkpoint.directory import LATEST, checkpoint_path, describe_files, set_link, write_manifest
from hstu.checkpoint.find import RUN_FILE, Run, belongs, check_belongs, locate


def make_run(path: Path, checkpoints: Path | None, gin: str = "A.b = 1\n") -> Run:
    path.mkdir(parents=True)
    run = Run.of(path, checkpoints, continues=False)
    (path / RUN_FILE).write_text(run.text())
    (path / "operative.gin").write_text(gin)
    return run


def make_checkpoint(directory: Path, iteration: int, run: Run | None, gin: str = "A.b = 1\n") -> Path:
    path = checkpoint_path(directory, iteration)
    path.mkdir(parents=True)
    files = {"operative.gin": gin} | ({} if run is None else {RUN_FILE: run.text()})
    for name, content in files.items():
        (path / name).write_text(content)
    write_manifest(path, describe_files(path, [path / name for name in files]))
    set_link(directory, LATEST, path)
    return path


def test_the_directory_of_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "mine", tmp_path / "checkpoints" / "mine")
    make_checkpoint(tmp_path / "checkpoints" / "mine", 2, run)
    newest = make_checkpoint(tmp_path / "checkpoints" / "mine", 4, run)
    assert locate(tmp_path / "runs" / "mine").resolve() == newest
    assert locate(tmp_path / "checkpoints" / "mine") == newest
    assert locate(newest) == newest


def test_a_run_is_found_after_it_was_moved_alone_or_with_its_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "here" / "runs" / "mine", tmp_path / "here" / "checkpoints")
    make_checkpoint(tmp_path / "here" / "checkpoints", 2, run)
    shutil.copytree(tmp_path / "here" / "runs" / "mine", tmp_path / "alone")
    assert locate(tmp_path / "alone").resolve() == checkpoint_path(tmp_path / "here" / "checkpoints", 2)
    (tmp_path / "here").rename(tmp_path / "there")
    assert locate(tmp_path / "there" / "runs" / "mine").resolve() == checkpoint_path(
        tmp_path / "there" / "checkpoints", 2
    )


def test_another_runs_checkpoint_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    saved_nothing = make_run(tmp_path / "first", tmp_path / "shared")
    other = make_run(tmp_path / "second", tmp_path / "shared")
    checkpoint = make_checkpoint(tmp_path / "shared", 2, other)
    with pytest.raises(
        DataError, match=r"first has no checkpoint in .*, which holds iteration_00000002 of the run .*second"
    ):
        locate(tmp_path / "first")
    assert not belongs(checkpoint, tmp_path / "first") and belongs(checkpoint, tmp_path / "second")
    with pytest.raises(DataError, match=r"is not of the run .*first, but of the run .*second"):
        check_belongs(checkpoint, tmp_path / "first")
    older = make_checkpoint(tmp_path / "shared", 1, saved_nothing)
    assert locate(tmp_path / "first").resolve() == older  # the newest of the run, not the newest


def test_a_run_that_saves_nothing_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", None)
    with pytest.raises(DataError, match=r"has saved no checkpoint: its TrainerArgs.ckpt_save_interval saves none"):
        locate(tmp_path / "run")


def test_a_delta_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "serving").mkdir()
    for file in ("manifest.json", "serving/manifest.json", "serving/delta.json"):
        (tmp_path / file).touch()
    for place in (tmp_path, tmp_path / "serving"):
        with pytest.raises(DataError, match=r"is a delta for servers: .* Give the run that it is of"):
            locate(place)


def test_a_run_that_goes_on_keeps_its_name(tmp_path: Path) -> None:
    first = make_run(tmp_path / "run", None)
    assert Run.of(tmp_path / "run", None, continues=True).id == first.id
    assert Run.of(tmp_path / "run", None, continues=False).id != first.id
    assert Run.of(tmp_path / "other", None, continues=True).id


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": 1, "directory": "a", "checkpoints": null}'])
def test_a_damaged_description_of_a_run_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(DataError, match=r"run\.json cannot be read"):
        Run.read(tmp_path)
    wrong: list[object] = [3, [], ""]
    for checkpoints in wrong:
        (tmp_path / RUN_FILE).write_text(json.dumps({"id": "a", "directory": "b", "checkpoints": checkpoints}))
        with pytest.raises(DataError, match=r"it\.checkpoints is"):
            Run.read(tmp_path)
