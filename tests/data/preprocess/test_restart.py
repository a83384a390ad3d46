"""Preprocessing that is killed goes on where it was, and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from hstu.base.files import Journal
from hstu.data.preprocess import InteractionColumns, import_interactions, preprocess, write
from hstu.data.store.layout import SEGMENT_FILE
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import REPOSITORY
from tests.serve.http_server import until

T = TypeVar("T")
GENERATE = REPOSITORY / "scripts" / "bench" / "generate_data.py"
SCRIPT = REPOSITORY / "scripts" / "preprocess_dataset.py"


def generate(directory: Path, rows: int, variant: str = "27k") -> Path:
    arguments = ["--output", str(directory), "--rows", str(rows), "--users", "50", "--items", "900", "--videos"]
    subprocess.run([sys.executable, str(GENERATE), *arguments, "--variant", variant], check=True, timeout=60)
    return directory


def stopped_after_each_stage(monkeypatch: pytest.MonkeyPatch, make: Callable[[], T]) -> tuple[T, list[str]]:
    """Calls ``make`` until it ends, stopped before and after it records each stage. Returns its result and them."""
    commit, stages = Journal.commit, []

    def stop(journal: Journal, stage: str, left: object = None) -> None:
        stages.append(stage)
        if stages.count(stage) > 1:
            commit(journal, stage, left)
        if stages.count(stage) < 3:
            raise KeyboardInterrupt

    for _ in range(200):
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(Journal, "commit", stop)
            return make(), stages
    raise AssertionError(f"it never ends; stages: {stages}")


def contents(store: Path) -> dict[str, bytes]:
    """File → its bytes, without the command and what only a store that has grown says of itself."""
    found = {file.name: file.read_bytes() for file in store.iterdir() if file.name != SEGMENT_FILE}
    described = json.loads(found["meta.json"])
    described["files"].pop(SEGMENT_FILE, None)
    for name in ("command", "sha256", "earlier_states", "num_segments"):
        described.pop(name, None)
    return found | {"meta.json": json.dumps(described).encode()}


def arrays(store: SequenceStore) -> dict[str, bytes]:
    """The contents without what a store says of itself."""
    return contents(store.path) | {"meta.json": b""}


def test_killed_and_stopped_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGTERM comes during a query, for which DuckDB has an exception of its own."""
    raw = generate(tmp_path / "raw", 60_000)
    command = [sys.executable, str(SCRIPT), "--dataset_name", "kuairand-27k", "--raw_path", str(raw)]
    partial = tmp_path / ".s.partial"
    journal = partial / "scratch" / "journal.json"
    for number, stage in ((signal.SIGKILL, "log_0"), (signal.SIGTERM, "log_2")):
        process = subprocess.Popen([*command, "--output", "s"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        until(lambda stage=stage: journal.exists() and stage in journal.read_text(), 60)
        finished = json.loads(journal.read_text())["stages"]
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert "Traceback" not in told and not (tmp_path / "s").exists()
        assert finished.items() <= json.loads(journal.read_text())["stages"].items()
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number, told
            assert told.splitlines()[-1] == "stopped; the same command goes on from here"
            assert "continuing an interrupted run" in told
    finished_store, other = (preprocess("kuairand-27k", raw_path=raw, output=tmp_path / name) for name in "st")
    assert contents(finished_store) == contents(other)
    assert sorted(os.listdir(tmp_path)) == ["raw", "s", "t"]


def test_other_raw_files_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tmp_path / "events.csv"
    events.write_text("u,i\n1,2\n1,3\n")

    def make() -> Path:
        columns = InteractionColumns(interactions=events, user="u", item="i")
        return import_interactions("mine", columns, output=tmp_path / "store")

    commit = Journal.commit

    def stop(journal: Journal, stage: str, left: object = None) -> None:
        commit(journal, stage, left)
        if stage == "users":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "commit", stop)
        make()
    events.write_text("u,i\n1,2\n")
    assert json.loads((make() / "meta.json").read_text())["num_events"] == 1


def test_no_byte_depends_on_the_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = generate(tmp_path / "raw", 2_000, "pure")
    one = contents(preprocess("kuairand-pure", raw_path=raw, output=tmp_path / "one"))
    monkeypatch.setattr(write, "_SORT_BYTES_PER_ROW", 3 * 10**8 // 100)
    assert contents(preprocess("kuairand-pure", raw_path=raw, output=tmp_path / "two", memory_limit="300MB")) == one


@pytest.mark.parametrize("rows", [1, 7, 50, 10**6])
def test_buckets_hold_whole_users_and_about_as_many_events_as_wanted(rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bounds = write.bucket_bounds(offsets, rows)
    assert (bounds[0], bounds[-1]) == (0, 40) and bounds == sorted(set(bounds))
    assert np.diff(offsets[bounds]).max() <= rows + lengths.max()
