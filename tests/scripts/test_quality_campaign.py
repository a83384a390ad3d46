"""The campaign of quality: rows can be trained, validation chooses, what is done is kept, and means have errors."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.data.store.sequence_store import SequenceStore
from scripts.quality import report, scaling
from scripts.quality import run as command
from scripts.quality.means import mean_and_error, number, paired_difference
from scripts.quality.runs import Places, Run, read_result_file, seconds_of
from scripts.quality.tables import TABLES, Row, Table, without_each
from tests.conftest import write_small_store

PEER = """
import json, sys, time
seed, base, folder = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
open(sys.argv[4], "a").write(f"{folder}\\n")
if base > 9: sys.exit("no memory left")
if base > 8: time.sleep(60)
result = {"metrics": {"NDCG@10": base + seed / 100, "HR@10": 2 * base}, "seconds": 3}
json.dump(result, open(folder + "/peer.json", "w"))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a peer that notes each call, data that takes no preprocessing, and no plots, which take seconds."""
    monkeypatch.setattr(report, "draw_metrics", lambda *_: None)
    (tmp_path / "peer.py").write_text(PEER)
    write_small_store(tmp_path / "data" / "toy", [[0, 1, 2, 3], [3, 2, 1]])
    return tmp_path


def table(place: Path, **bases: float) -> Table:
    """Rows of peers, with what they score for seed 0."""

    def peer(base: float) -> tuple[str, ...]:
        return (str(place / "peer.py"), "$seed", str(base), "$folder", str(place / "calls"))

    rows = tuple(Row(name=name, peer=peer(base)) for name, base in bases.items())
    return replace(TABLES["ml_1m_retrieval"], dataset="toy", rows=rows, reference=next(iter(bases)))


def run(place: Path, *arguments: str) -> int:
    directories = [part for name in ("data", "work", "output") for part in (f"--{name}", str(place / name))]
    return command.main(["--table", "toy", *directories, *arguments])


def calls(place: Path) -> int:
    file = place / "calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_means_have_the_standard_error_of_the_sample() -> None:
    values = [0.31, 0.34, 0.36]
    assert mean_and_error(values) == pytest.approx((np.mean(values), np.std(values, ddof=1) / 3**0.5))
    assert np.isnan(mean_and_error([0.3])[1])
    assert paired_difference({1: 0.5, 2: 0.7, 4: 9.0}, {1: 0.4, 2: 0.5, 3: 0.0}) == pytest.approx((0.15, 0.05))
    assert [number(0.34125, 0.0031), number(-0.0005, sign=True), number(1.2), number(float("nan"))] == [
        ".3412 ± .0031", "−.0005", "1.2000", ""
    ]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_table_can_be_trained(name: str, tmp_path: Path) -> None:
    places = Places(data=tmp_path, work=tmp_path, output=tmp_path)
    for row in TABLES[name].rows:
        Run(table_name=name, table=TABLES[name], row=row, seed=1, places=places).check()
    table = TABLES[name]
    assert table.chooses(table.row(table.reference)) and not all(table.chooses(row) for row in table.rows)


def test_rows_without_a_part_undo_it_on_top_of_the_recipe() -> None:
    rows = {row.name: row.bindings for row in without_each({"a": ["A.x = 1"], "b": ["B.y = 2", "B.z = 3"]})}
    assert rows == {"all": (), "without a": ("A.x = 1",), "without b": ("B.y = 2", "B.z = 3")}


def test_rows_prepare_what_they_say_or_what_their_gin_file_needs() -> None:
    table = replace(
        TABLES["ml_1m_retrieval"], prepare=(("table.py",),),
        rows=(
            Row(name="all"),
            Row(name="longer", epochs_of="all"),
            Row(name="own", epochs_of="all", prepare=(("own.py",),)),
            Row(name="other file", config="other.gin"),
        ),
    )  # fmt: skip
    prepared = {row.name: [script for (script,) in table.prepare_of(row)] for row in table.rows}
    assert prepared == {"all": ["table.py"], "longer": ["table.py"], "own": ["own.py"], "other file": []}


def test_what_is_done_is_kept_and_the_table_has_means_errors_and_pairs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "toy", table(place, sasrec=0.2, ease=0.25))
    assert run(place, "--seeds", "3", "--rows", "ease") == 0 and calls(place) == 3
    assert run(place, "--seeds", "3", "--jobs", "2") == 0 and calls(place) == 6
    lines = (place / "output" / "toy" / "README.md").read_text().splitlines()
    assert "| ease | .2700 ± .0058 | .5000 ± .0000 |  |  | +.0500 ± .0000 | 3 |  | 0.1 |  |" in lines
    assert "ETA" in capsys.readouterr().out

    header, _ = read_result_file(place / "output" / "toy" / "raw" / "ease-seed1.jsonl")
    assert header["data"] == {"users": 2, "items": 4, "events": 7}
    monkeypatch.setitem(TABLES, "toy", table(place, sasrec=0.2, ease=0.3))
    assert run(place, "--seeds", "1", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "sasrec, seed 1: done" in shown and "ease, seed 1: to do again: its settings or its data have" in shown


def test_a_failed_run_does_not_stop_the_others(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "toy", table(place, broken=9.5, ease=0.25))
    assert run(place, "--seeds", "1") == 1
    shown = capsys.readouterr().out
    assert "broken, seed 1: failed" in shown and "no memory left" in shown
    page = (place / "output" / "toy" / "README.md").read_text()
    assert "| broken | not run |" in page and "| ease | .2600 |" in page


def test_a_stop_signal_ends_what_runs_and_keeps_what_is_done(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "toy", table(place, ease=0.25, endless=8.5))
    write = command.execute

    def stopped_soon(runs: Sequence[Run], jobs: int) -> list[Run]:
        threading.Thread(target=stop_when, args=(lambda: calls(place) == 2,)).start()
        return write(runs, jobs)

    monkeypatch.setattr(command, "execute", stopped_soon)
    begun = time.monotonic()
    assert run(place, "--seeds", "1") == 128 + signal.SIGTERM and time.monotonic() - begun < 40
    assert "the same command goes on" in capsys.readouterr().err
    assert "| ease | .2600 |" in (place / "output" / "toy" / "README.md").read_text()


def stop_when(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_training_goes_on_and_validation_says_which_weights_are_tested(
    ml_100k_store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("TrainerArgs.num_train_epochs = 3.0", "TrainerArgs.eval_interval = 9", "NetworkArgs.num_layers = 1",
             "DatasetArgs.max_sequence_length = 20", "TrainerArgs.log_interval = 1",
             "TrainerArgs.train_batch_size = 32")  # fmt: skip
    rows = (Row(name="short", bindings=short), Row(name="whole", epochs_of="short"))
    tiny = replace(TABLES["ml_100k_retrieval"], rows=rows, reference="short", dataset=ml_100k_store.path.name)
    monkeypatch.setitem(TABLES, "tiny", tiny)

    def start(folder: str, *more: str) -> int:
        places = ["--data", str(ml_100k_store.path.parent), "--work", str(tmp_path / folder / "work")]
        arguments = ["--table", "tiny", "--seeds", "1", "--threads", "1", *places, *more]
        return command.main([*arguments, "--output", str(tmp_path / folder)])

    def results(folder: str, row: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        records = read_result_file(tmp_path / folder / "tiny" / "raw" / f"{row}-seed1.jsonl")[1]
        return [record for record in records[:-1] if record["kind"] == "eval"], records[-1]

    assert start("at once") == 0
    evaluations, result = results("at once", "short")
    valid = [each for each in evaluations if each["split"] == "valid"]
    best = max(valid, key=lambda each: each["metrics"]["NDCG@10"])
    assert len(valid) > 3 and (result["iteration"], result["validation"]) == (best["iter"], best["metrics"])
    assert result["tokens"] > 0
    assert {file.name for file in (tmp_path / "at once" / "tiny").glob("*.png")} == {"curves.png", "metrics.png"}
    evaluations, whole = results("at once", "whole")
    assert len(evaluations) == 1 and whole["epochs"] == max(1, round(result["epoch"]))

    def has_begun() -> bool:
        return any("eval" in file.read_text() for file in tmp_path.glob("stopped/work/*/*/*/metrics.jsonl"))

    threading.Thread(target=stop_when, args=(has_begun,)).start()
    assert start("stopped", "--rows", "short") == 128 + signal.SIGTERM
    assert not (tmp_path / "stopped" / "tiny" / "raw").exists()
    assert start("stopped", "--rows", "short") == 0
    resumed = results("stopped", "short")[1]
    assert [resumed[name] for name in ("metrics", "iteration")] == [result[name] for name in ("metrics", "iteration")]


def test_names_that_do_not_exist_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--table", "ml_1m_retrival"]) == 2
    assert "did you mean 'ml_1m_retrieval'" in capsys.readouterr().err
    assert command.main(["--table", "ml_1m_retrieval", "--rows", "without genre and year"]) == 2
    assert "did you mean 'without genres and year'" in capsys.readouterr().err
    assert command.main(["--table", "ml_1m_retrieval", "--gin-bindings", "TrainerArgs.seed = 3"]) == 2
    assert "--output" in capsys.readouterr().err
    arguments = ["--output", str(place), "--gin-bindings", "NetworkArgs.num_layer = 3", "--dry-run"]
    assert command.main(["--table", "ml_1m_retrieval", *arguments]) == 2
    error = capsys.readouterr().err
    assert "row 'all'" in error and "did you mean 'num_layers'" in error


def test_a_power_law_is_found_with_its_uncertainty() -> None:
    flops = np.geomspace(1e9, 1e12, 12)
    exact = 2.0 + 0.5 * (flops / np.exp(np.log(flops).mean())) ** -0.3
    fit = scaling.fit_power_law(flops.tolist(), exact.tolist())
    assert fit is not None and (fit.a, fit.b, fit.c) == pytest.approx((2.0, 0.5, 0.3), rel=1e-3)
    assert fit.at(flops) == pytest.approx(exact)
    noise = np.random.default_rng(0).normal(0, 0.02, (20, 12))
    fits = [scaling.fit_power_law(flops.tolist(), (exact + row).tolist()) for row in noise]
    off = np.array([(found.c - 0.3) / found.errors[2] for found in fits if found is not None])
    assert len(off) > 15 and 0.4 < np.std(off) < 2.5  # the error that is told is the one that is made
    assert scaling.fit_power_law([1e9, 1e10, 1e11], [3.0, 2.0, 1.5]) is None


def test_sizes_change_one_thing_at_a_time(tmp_path: Path) -> None:
    assert scaling.sizes({"width": 8, "depth": 2}, {"width": (4, 8), "depth": (2, 4)}) == [
        {"width": 8, "depth": 2}, {"width": 4, "depth": 2}, {"width": 8, "depth": 4}
    ]  # fmt: skip
    study = scaling.films()
    for run in scaling.runs_of(study, Places(data=tmp_path, work=tmp_path, output=tmp_path), threads=1):
        run.check()
    points = [scaling.Point(size, 1e9 * 2**place, 5 - place / 8, 0.1) for place, size in enumerate(study.sizes)]
    page = scaling.describe(study, points, None)
    assert "| 16 | 2 | 32 | 1.00e+09 | 5.0000 | .1000 |" in page and "do not determine" in page


def test_time_is_that_of_all_attempts() -> None:
    train = [json.dumps({"kind": "train", "time_s": seconds}) for seconds in (1.0, 5.0, 2.0, 3.5)]
    assert seconds_of([*train[:2], '{"kind": "tra', '{"kind": "resumed"}', *train[2:]]) == 8.5
