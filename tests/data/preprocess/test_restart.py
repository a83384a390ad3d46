"""Preprocessing that is killed goes on where it was, and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from hstu.base.files import Journal
from hstu.data.preprocess import preprocess, write
from tests.conftest import REPOSITORY

T = TypeVar("T")
GENERATE = REPOSITORY / "scripts" / "bench" / "generate_data.py"
SCRIPT = REPOSITORY / "scripts" / "preprocess_dataset.py"


def generate(directory: Path, rows: int, variant: str = "27k") -> Path:
    arguments = ["--output", str(directory), "--rows", str(rows), "--users", "50", "--items", "900"]
    subprocess.run([sys.executable, str(GENERATE), *arguments, "--variant", variant], check=True, timeout=60)
    return directory


def stopped_after_each_stage(monkeypatch: pytest.MonkeyPatch, make: Callable[[], T]) -> tuple[T, list[str]]:
    """Calls ``make`` until it ends, stopped when it first finishes a stage. Returns its result, and the stages."""
    commit, stages = Journal.commit, []

    def stop(journal: Journal, stage: str, left: object = None) -> None:
        commit(journal, stage, left)
        if stage not in stages:
            stages.append(stage)
            raise KeyboardInterrupt

    for _ in range(100):
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(Journal, "commit", stop)
            return make(), stages
    raise AssertionError(f"it never ends; stages: {stages}")


def contents(store: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in store.iterdir()}
    return found | {"meta.json": b"" if "meta.json" not in found else _without_command(found["meta.json"])}


def _without_command(meta: bytes) -> bytes:
    described = json.loads(meta)
    return json.dumps({name: described[name] for name in described if name not in ("command", "sha256")}).encode()


def test_a_run_stopped_after_any_stage_goes_on_to_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = generate(tmp_path / "raw", 3_000)
    monkeypatch.setattr(write, "_SORT_BYTES_PER_ROW", 4 * 10**9 // 800)  # buckets of some 800 events
    expected = contents(preprocess("kuairand-27k", raw_path=raw, output=tmp_path / "undisturbed"))
    commit, commits = Journal.commit, 0

    def stop_after(journal: Journal, stage: str, left: object = None) -> None:
        nonlocal commits
        commit(journal, stage, left)
        commits += 1
        if commits in stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", stop_after)
    stops = set(range(1, 100))  # after each stage: every start gets one stage further
    starts, finished = 0, None
    while finished is None:
        starts += 1
        try:
            finished = preprocess("kuairand-27k", raw_path=raw, output=tmp_path / "stopped")
        except KeyboardInterrupt:
            assert not (tmp_path / "stopped").exists()
    assert starts > 12
    assert contents(finished) == expected
    assert sorted(os.listdir(tmp_path)) == ["raw", "stopped", "undisturbed"]


def test_killed_twice_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    raw = generate(tmp_path / "raw", 150_000)
    command = [sys.executable, str(SCRIPT), "--dataset_name", "kuairand-27k", "--raw_path", str(raw)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    subprocess.run([*command, "--output", "s"], cwd=tmp_path / "a", check=True, timeout=120, capture_output=True)
    journal = tmp_path / "b" / ".s.partial" / "scratch" / "journal.json"
    for stage in ("log_0", "users"):
        process = subprocess.Popen([*command, "--output", "s"], cwd=tmp_path / "b")
        deadline = time.monotonic() + 60
        while not (journal.exists() and stage in journal.read_text()) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
    done = subprocess.run([*command, "--output", "s"], cwd=tmp_path / "b", capture_output=True, text=True, check=True)
    assert "continuing an interrupted run" in done.stderr
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / name / "s").iterdir()} for name in "ab")
    assert one == other


@pytest.mark.parametrize(
    ("number", "stages"),
    [(signal.SIGINT, ("log_0", "users")), pytest.param(signal.SIGTERM, ("log_2",), marks=pytest.mark.slow)],
)
def test_a_stop_signal_keeps_the_finished_stages(
    number: signal.Signals, stages: tuple[str, ...], tmp_path: Path
) -> None:
    """The signal comes during a query, for which DuckDB has an exception of its own."""
    raw = generate(tmp_path / "raw", 150_000)
    command = [sys.executable, str(SCRIPT), "--dataset_name", "kuairand-27k", "--raw_path", str(raw), "--no_report"]
    journal = tmp_path / ".s.partial" / "scratch" / "journal.json"
    for stage in stages:
        process = subprocess.Popen(
            [*command, "--output", "s"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        )
        deadline = time.monotonic() + 60
        while not (journal.exists() and stage in journal.read_text()) and time.monotonic() < deadline:
            time.sleep(0.002)
        finished = json.loads(journal.read_text())["stages"]
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 128 + number, told
        assert told.splitlines()[-1] == "stopped; the same command goes on from here"
        assert "Traceback" not in told
        assert finished.items() <= json.loads(journal.read_text())["stages"].items()
    done = subprocess.run([*command, "--output", "s"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "continuing an interrupted run" in done.stderr
    other = subprocess.run([*command, "--output", "t"], cwd=tmp_path, capture_output=True, check=True)
    assert other.returncode == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def test_other_raw_files_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = generate(tmp_path / "raw", 500, "pure")
    commit = Journal.commit

    def stop(journal: Journal, stage: str, left: object = None) -> None:
        commit(journal, stage, left)
        if stage == "users":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "commit", stop)
        preprocess("kuairand-pure", raw_path=raw, output=tmp_path / "store")
    log = raw / "log_standard_4_08_to_4_21_pure.csv"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    store = preprocess("kuairand-pure", raw_path=raw, output=tmp_path / "store")
    assert json.loads((store / "meta.json").read_text())["num_events"] == 499


@pytest.mark.parametrize("limit", ["300MB", pytest.param("4GB", marks=pytest.mark.slow)])
def test_no_byte_depends_on_the_memory_limit(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = generate(tmp_path / "raw", 2_000, "pure")
    one = contents(preprocess("kuairand-pure", raw_path=raw, output=tmp_path / "one"))
    monkeypatch.setattr(write, "_SORT_BYTES_PER_ROW", 3 * 10**8 // 100)
    assert contents(preprocess("kuairand-pure", raw_path=raw, output=tmp_path / "two", memory_limit=limit)) == one


@pytest.mark.parametrize("rows", [1, 7, 50, 10**6])
def test_buckets_hold_whole_users_and_about_as_many_events_as_wanted(rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bounds = write.bucket_bounds(offsets, rows)
    assert (bounds[0], bounds[-1]) == (0, 40) and bounds == sorted(set(bounds))
    assert np.diff(offsets[bounds]).max() <= rows + lengths.max()
