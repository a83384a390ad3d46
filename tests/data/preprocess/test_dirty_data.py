"""What users bring: each kind of dirt gets one message that says what, where and what to do, and exit code 3."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hstu.base.errors import DataError
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.conftest import REPOSITORY
from tests.data.preprocess.dirty_inputs import ALL, DIRT, GOOD, named
from tests.data.preprocess.test_restart import stopped_after_each_stage

SCRIPT = REPOSITORY / "scripts" / "preprocess_dataset.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dirt", DIRT)
def test_dirt_is_named_with_its_place_and_nothing_is_left(
    dirt: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, files, message = DIRT[dirt]
    for name, content in files.items():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            content(Path(name))
    code = main([*arguments, "--output", "store"])
    told = capsys.readouterr().err
    assert re.search(message.replace(".csv", r"\.csv"), told), told
    assert code == 3
    assert len([line for line in told.splitlines() if line]) == 1, "one clear message"
    assert sorted(os.listdir()) == sorted(files), "nothing half-written"


CLEANABLE = GOOD + b",7,1,1\n3,,1,2\n3,7,1\n3,7,one,4\n3,7,1,5\n"


def test_bad_rows_may_be_skipped_and_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("events.csv").write_bytes(CLEANABLE)
    assert main([*ALL, "--output", "dirty", "--bad_row_policy", "skip"]) == 0
    Path("events.csv").write_bytes(GOOD + b"3,7,1,5\n")
    assert main([*ALL, "--output", "clean"]) == 0
    dirty, clean = SequenceStore.open("dirty"), SequenceStore.open("clean")
    for name in ("i", "a", "t"):
        assert dirty.sequence(name).tolist() == clean.sequence(name).tolist()
    assert dirty.raw_ids("user_id").tolist() == [1, 2, 3]
    reasons = ("too few columns", "unusable user", "unusable item", "unusable action")
    assert dirty.statistics["skipped_rows"] == dict.fromkeys(reasons, 1)
    assert "skipped: events.csv:7: expected columns: 4 found: 3" in caplog.text


def test_skipping_has_a_cap(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("events.csv").write_bytes(CLEANABLE)
    assert main([*ALL, "--output", "s", "--bad_row_policy", "skip", "--max_bad_rows", "3"]) == 3
    assert "That makes 4 bad rows, more than --max_bad_rows 3" in capsys.readouterr().err
    assert os.listdir() == ["events.csv"]


ACCEPTED = {
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "CR LF": GOOD.replace(b"\n", b"\r\n"),
    "no line break at the end": GOOD[:-1],
    "unsorted": b"u,i,a,t\n2,7,1,12\n1,8,0,11\n1,7,2,10\n",
    "blank lines": GOOD.replace(b"\n", b"\n\n"),
    "quotes": GOOD.replace(b"7", b'"7"'),
    "other columns besides": b"x,u,i,a,t\nq,1,7,2,10\nq,1,8,0,11\nq,2,7,1,12\n",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of GOOD."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "events.csv").write_bytes(GOOD)
    assert main([*named(str(folder / "events.csv")), "--output", str(folder / "store")]) == 0
    return folder / "store"


@pytest.mark.parametrize("form", ACCEPTED)
def test_harmless_differences_of_form_change_nothing(form: str, plain: Path, folder: Path) -> None:
    Path("events.csv").write_bytes(ACCEPTED[form])
    assert main([*ALL, "--output", "store"]) == 0
    for file in plain.glob("*.npy"):
        assert (Path("store") / file.name).read_bytes() == file.read_bytes(), file.name


def test_ids_beyond_int64_are_taken_as_text(folder: Path) -> None:
    Path("events.csv").write_bytes(GOOD + b"18446744073709551616,7,1,13\n")
    assert main([*ALL, "--output", "store"]) == 0
    assert SequenceStore.open("store").raw_ids("user_id").tolist() == ["1", "18446744073709551616", "2"]


def test_one_event_users_and_a_user_of_most_events(folder: Path) -> None:
    events = np.arange(200_000)
    table = {"u": np.where(events % 1000, 5, events), "i": events % 97, "a": events % 3, "t": 10**9 + events[::-1]}
    pd.DataFrame(table).to_parquet("e.parquet")
    assert main([*named("e.parquet"), "--output", "store"]) == 0
    store = SequenceStore.open("store")
    lengths = np.diff(store.offsets())
    assert sorted(lengths.tolist()) == [1] * 200 + [199_800]
    begin = store.offsets()[lengths.argmax()]
    assert (np.diff(store.sequence("t")[begin : begin + 199_800]) > 0).all()


def run_script(*arguments: str, cwd: Path, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)


def many_events(file: Path) -> None:
    events = np.random.default_rng(0).permutation(300_000)
    pd.DataFrame({"u": events % 1000, "i": events * 7919, "a": 1, "t": 10**9 + events}).to_csv(file, index=False)


@pytest.mark.parametrize("limit", [100_000, 2_000_000])
def test_a_write_that_fails_is_told_and_undone(limit: int, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the full disk; the kernel refuses the write in the same way."""
    many_events(tmp_path / "events.csv")
    failed = run_script(*ALL, "--output", "store", cwd=tmp_path, file_limit=limit)
    assert failed.returncode == 3, failed.stderr
    assert "choose another --output" in failed.stderr and "Traceback" not in failed.stderr
    assert os.listdir(tmp_path) == ["events.csv"]


@pytest.mark.parametrize(("size", "options"), [("3m", ""), ("8m", ",ro")])
def test_a_full_and_a_read_only_disk(size: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, raw = tmp_path / "disk", tmp_path / "raw"
    disk.mkdir()
    raw.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("NEEDS THE RIGHT TO MOUNT: a small disk of its own")
    try:
        many_events(raw / "events.csv")
        monkeypatch.chdir(raw)
        with pytest.raises(DataError, match=r"free some space|Read-only file system"):
            import_interactions("mine", InteractionColumns(interactions=Path("events.csv"), user="u", item="i",
                                action="a", time="t"), output=disk / "store")  # fmt: skip
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_of_two_processes_at_once_one_makes_the_store(tmp_path: Path) -> None:
    many_events(tmp_path / "events.csv")
    command = [sys.executable, str(SCRIPT), *ALL, "--output", "store"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.wait(timeout=120): process.stderr.read() for process in both if process.stderr}
    assert 0 in told
    assert set(told) == {0} or re.search("another process is writing|--force replaces it", told[3]), told
    assert SequenceStore.open(tmp_path / "store").num_events == 300_000
    assert sorted(os.listdir(tmp_path)) == ["events.csv", "store", "store_retrieval.gin"]


def test_ctrl_c_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("events.csv").write_bytes(GOOD)
    code, stages = stopped_after_each_stage(monkeypatch, lambda: main([*ALL, "--output", "store"]))
    assert code == 130 and len(stages) == 1
    assert capsys.readouterr().err.strip() == "stopped; the same command goes on from here"
    assert sorted(os.listdir()) == [".store.partial", "events.csv"]
    assert main([*ALL, "--output", "store"]) == 0
    assert sorted(os.listdir()) == ["events.csv", "store", "store_ranking.gin"]


PATHS_LIKE_PATTERNS = {
    "a*[1]": "axx1",
    "what?": "whatx",
    "u=77/events": "plain",  # as DuckDB's partitions by a column are named
    "out[1]*/events": "out1/events",
}


@pytest.mark.parametrize("suffix", [".csv.gz", ".parquet"])
@pytest.mark.parametrize("name", PATHS_LIKE_PATTERNS)
def test_a_path_is_one_file_and_never_a_pattern(name: str, suffix: str, folder: Path) -> None:
    for stem, item in ((name, "wanted"), (PATHS_LIKE_PATTERNS[name], "another")):
        file = Path(f"{stem}{suffix}")
        file.parent.mkdir(exist_ok=True)
        table = pd.DataFrame({"u": [1], "i": [item], "a": [1], "t": [5]})
        table.to_parquet(file) if suffix == ".parquet" else table.to_csv(file, index=False)
    output = Path(f"{name}.store")
    assert main([*named(f"{name}{suffix}"), "--output", str(output)]) == 0
    store = SequenceStore.open(output)
    assert store.raw_ids("i").tolist() == ["wanted"]
    assert store.raw_ids("user_id").tolist() == [1]


def test_names_and_ids_with_control_characters_steer_no_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("events.csv").write_text('u,i\x1b[2J,"a\nb"\n1,\x1b]0;x\x07<b>|,1\n2,<script>,1\n')
    words = ["--dataset_name", "mine", "--interactions", "events.csv", "--user", "u", "--output", "s"]
    assert main([*words, "--item", "absent"]) == 3
    assert main([*words, "--item", "i\x1b[2J", "--action", "a\nb"]) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    assert r"i\x1b[2J" in told.out and r"i\x1b[2J" in told.err
