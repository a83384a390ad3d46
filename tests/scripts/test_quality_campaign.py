"""The campaign of quality: rows can be trained, validation chooses, what is done is kept, and means have errors."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts.quality import report
from scripts.quality import run as command
from scripts.quality.means import mean_and_error, number, paired_difference
from scripts.quality.runs import Places, Run, read_results
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
    assert table.chooses(table.row(table.reference))


def test_rows_without_a_part_undo_it_on_top_of_the_recipe() -> None:
    rows = {row.name: row.bindings for row in without_each({"a": ["A.x = 1"], "b": ["B.y = 2", "B.z = 3"]})}
    assert rows == {"all": (), "without a": ("A.x = 1",), "without b": ("B.y = 2", "B.z = 3")}


def test_what_is_done_is_kept_and_the_table_has_means_errors_and_pairs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "toy", table(place, sasrec=0.2, ease=0.25))
    assert run(place, "--seeds", "3", "--rows", "ease") == 0 and calls(place) == 3
    assert run(place, "--seeds", "3", "--jobs", "2") == 0 and calls(place) == 6
    lines = (place / "output" / "toy" / "README.md").read_text().splitlines()
    assert (
        "| ease | .2700 ± .0058 | .5000 ± .0000 |  |  | .2700 ± .0058 | .5000 ± .0000 | +.0500 ± .0000 | 3 |  | 0.1 |"
        in lines
    )

    line = read_results(place / "output" / "toy" / "results.jsonl")["ease", 1]
    assert line["data"] == {"users": 2, "items": 4, "events": 7}
    monkeypatch.setitem(TABLES, "toy", table(place, sasrec=0.2, ease=0.3))
    assert run(place, "--seeds", "1", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "sasrec, seed 1: done" in shown and "ease, seed 1: to do again: its settings or its data have" in shown


@pytest.mark.slow
def test_a_reader_can_recompute_the_table_from_the_ranks_of_one_seed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    times = [np.cumsum(rng.choice([0, 30, 5000], length)).tolist() for length in rng.integers(4, 12, 60)]
    items = [rng.permutation(40)[: len(each)].tolist() for each in times]
    write_small_store(place / "data" / "ml-100k", items, timestamps=times, name="ml-100k", item_feature="movie_id")
    (place / "peer.py").write_text(
        "import sys; write = lambda name, text: open(f'{sys.argv[1]}/{name}', 'w').write(text)\n"
        'write(\'peer.json\', \'{"metrics": {"NDCG@10": 0.63093, "HR@10": 1.0}}\')\n'
        "write('per_user.csv', '\\n'.join(['user,rank', *(f'{user},2' for user in range(100, 160))]))\n"
    )
    made = replace(
        TABLES["ml_100k_retrieval"], reference="a, b", published=(("a paper", 0.1, 0.2),),
        rows=(Row(name="a, b", trials=7), Row(name="second", peer=(str(place / "peer.py"), "$folder"))),
        bindings=(
            "NetworkArgs.num_layers = 1", "NetworkArgs.hidden_size = 8", "NetworkArgs.kv_channels = 4",
            "DatasetArgs.side_feature_names = []", "RetrievalArgs.item_tower = False",
            'DatasetArgs.action_feature_name = ""', "TrainerArgs.num_train_epochs = 1.0",
            "TrainerArgs.eval_interval = 2",
        ),
    )  # fmt: skip
    monkeypatch.setitem(TABLES, "toy", made)
    for row in ("a, b", "second"):
        assert run(place, "--seeds", "1", "--rows", row) == 0
    kept = pd.read_csv(place / "output" / "toy" / "per_user.csv.gz", index_col="user")
    assert kept.index.tolist() == [*range(100, 160)]
    reported = read_results(place / "output" / "toy" / "results.jsonl")["a, b", 1]["result"]["metrics"]
    for clock in ("", "/last_event"):
        rank = kept[f"a, b{clock}"].to_numpy()
        hit = rank <= 10
        assert reported[f"HR@10{clock}"] == pytest.approx(hit.mean())
        assert reported[f"NDCG@10{clock}"] == pytest.approx((hit / np.log2(1 + rank)).mean())

    page = (place / "output" / "toy" / "README.md").read_text()
    hit = kept["a, b"].to_numpy() <= 10
    half = number(1.96 * float(hit.std(ddof=1)) / 60**0.5)
    assert f" / {half} | 7 | 1 |" in page and "| a paper | .1000 | .2000 | |" in page
    in_second = hit[[each[-1] == each[-2] for each in times]]
    assert f"| row | same second ({len(in_second)}) |" in page and f"| a, b | {number(in_second.mean())} |" in page
    assert "| second | 1.0000 | 1.0000 | 1.0000 |" in page


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
    threading.Thread(target=stop_when, args=(lambda: calls(place) == 2,)).start()
    begun = time.monotonic()
    assert run(place, "--seeds", "1") == 128 + signal.SIGTERM and time.monotonic() - begun < 40
    assert "the same command goes on" in capsys.readouterr().err
    assert "| ease | .2600 |" in (place / "output" / "toy" / "README.md").read_text()


def stop_when(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_names_that_do_not_exist_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--table", "ml_1m_retrival"]) == 2
    assert "did you mean 'ml_1m_retrieval'" in capsys.readouterr().err
    assert command.main(["--table", "ml_100k_retrieval", "--rows", "without four layer"]) == 2
    assert "did you mean 'without four layers'" in capsys.readouterr().err
    assert command.main(["--table", "ml_1m_retrieval", "--gin-bindings", "TrainerArgs.seed = 3"]) == 2
    assert "--output" in capsys.readouterr().err
    arguments = ["--output", str(place), "--gin-bindings", "NetworkArgs.num_layer = 3", "--dry-run"]
    assert command.main(["--table", "ml_1m_retrieval", *arguments]) == 2
    error = capsys.readouterr().err
    assert "row 'all'" in error and "did you mean 'num_layers'" in error
