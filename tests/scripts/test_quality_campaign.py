"""Sweeps and the campaign of quality: validation chooses, what is done is kept, and means have errors.

Other methods that predict ratings are measured on the labels of a run.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from hstu.base.errors import UserError
from hstu.config.gin_io import load_stored
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from hstu.sweep.trial import Trial, number
from hstu.train.evaluate import Observations
from scripts import sweep
from scripts.quality import report
from scripts.quality import run as command
from scripts.quality.evaluate import counted, influences
from scripts.quality.ranking_peers import SPACES, Labels, Trees, inputs, main, measure
from scripts.quality.report import mean_and_error, paired_difference
from scripts.quality.runs import Run, read_results
from scripts.quality.tables import ROOT, TABLES, Table
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
TINY = f"""
include "{ROOT}/configs/quality/ml_100k_retrieval/all.gin"
NetworkArgs.num_layers = 1
NetworkArgs.hidden_size = 8
NetworkArgs.kv_channels = 4
DatasetArgs.side_feature_names = []
RetrievalArgs.item_tower = False
DatasetArgs.action_feature_name = ""
TrainerArgs.num_train_epochs = 1.0
TrainerArgs.eval_interval = 2
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
    scores, calls = bases.items(), str(place / "calls")
    peers = {name: {"command": [str(place / "peer.py"), "$seed", str(base), "$folder", calls]} for name, base in scores}
    shown = TABLES["ml_1m_retrieval"].metrics
    return Table(folder=place / "toy", title="", dataset="toy", metrics=shown, reference=min(bases), peers=peers)


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
    table = TABLES[name]
    runs = [Run(table=table, row=row, seed=1, data=tmp_path, work=tmp_path, output=tmp_path) for row in table.rows]
    for run in runs:
        run.check()
    reference = runs[0].trial
    assert runs[0].row.name == table.reference and reference
    has_validation = getattr(reference.config.dataset, "split", "") != "time" or table.task == "retrieval"
    assert reference.config.trainer.best_metric == (table.metric if has_validation else None)


def test_what_is_done_is_kept_and_the_table_has_means_errors_and_pairs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TABLES, "toy", table(place, bert=0.2, ease=0.25))
    assert run(place, "--seeds", "3", "--rows", "ease") == 0 and calls(place) == 3
    assert run(place, "--seeds", "3", "--jobs", "2") == 0 and calls(place) == 6
    lines = (place / "output" / "toy" / "README.md").read_text().splitlines()
    assert (
        "| ease | .2700 ± .0058 | .5000 ± .0000 |  |  | .2700 ± .0058 | .5000 ± .0000 | +.0500 ± .0000 | 3 |  | 0.1 |"
        in lines
    )

    line = read_results(place / "output" / "toy" / "results.jsonl")["ease", 1]
    assert line["data"] == {"users": 2, "items": 4, "events": 7}
    monkeypatch.setitem(TABLES, "toy", table(place, bert=0.2, ease=0.3))
    assert run(place, "--seeds", "1", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "bert, seed 1: done" in shown and "ease, seed 1: to do again: its settings or its data have" in shown


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
    (place / "toy").mkdir()
    (place / "toy" / "a_b.gin").write_text(f"# a, b\n{TINY}")
    made = Table(
        folder=place / "toy", title="", dataset="ml-100k", metrics=TABLES["ml_100k_retrieval"].metrics, trials=7,
        reference="a, b", published=(("a paper", 0.1, 0.2),),
        peers={"second": {"command": [str(place / "peer.py"), "$folder"]}},
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


# --- sweeps ---


def sweep_of(place: Path, *arguments: str, grid: str = "OptimizerArgs.learning_rate = [1e-3, 2e-3, 3e-3]") -> int:
    """Sweep the tiny file on a small store."""
    if not (place / "tiny.gin").exists():
        (place / "tiny.gin").write_text(TINY + f"DatasetArgs.dataset_path = {str(place / 'store')!r}\n")
        items = [[(user + step * step) % 9 for step in range(5)] for user in range(24)]
        times = [[*range(5)]] * 24
        write_small_store(place / "store", items, timestamps=times, name="ml-100k", item_feature="movie_id")
    return sweep.main([str(place / "tiny.gin"), "--output", str(place / "out"), "--grid", grid, *arguments])


def pretend(trial: Trial) -> Iterator[list[str]]:
    """A run directory as of a training, where the test part would choose the highest rate and validation the second."""
    rate = trial.config.optimizer.learning_rate
    trial.folder.mkdir(parents=True, exist_ok=True)
    with (trial.root / "calls").open("a") as calls:
        calls.write(f"{trial}\n")
    if rate == 1e-3 and trial.seed == 2:
        raise UserError("exit code 1")
    valid = {"NDCG@10": 0.3 - abs(rate - 2e-3) + trial.seed / 100}
    evaluation = {"kind": "eval", "iter": 4, "epoch": 0.5, "split": "valid", "metrics": valid}
    (trial.folder / "metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
    (trial.folder / "summary.json").write_text(json.dumps({"status": "done", "best": {"split": "valid", "iter": 4}}))
    tested = {"metrics": {"NDCG@10": 0.2 + rate}, "half_widths": {"NDCG@10": 0.05}}
    (trial.folder / "test.json").write_text(json.dumps(tested))
    yield from ()


def test_a_stopped_training_is_told_and_not_evaluated(place: Path) -> None:
    table = TABLES["ml_100k_retrieval"]
    run = Run(table=table, row=table.rows[0], seed=1, data=place, work=place, output=place)
    commands = run.commands()
    next(commands)
    (run.folder / "summary.json").write_text('{"status": "stopped"}')
    with pytest.raises(UserError, match="the training was stopped before its end; the same command goes on"):
        next(commands)


def test_validation_chooses_the_setting_and_only_what_is_missing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "commands", pretend)
    assert sweep_of(tmp_path, "--seeds", "2", "--jobs", "2") == 1
    table = (tmp_path / "out" / "table.md").read_text()
    first, second, third = (line.split("|")[1:-1] for line in table.splitlines()[2:5])
    assert [cell.strip() for cell in first] == [
        "learning_rate=0.002", ".3150 ± .0050", ".2020 ± .0000", "± .0500", "2", "0.5", "0.0"
    ]  # fmt: skip
    assert "learning_rate=0.003" in second[0] and "learning_rate=0.001" in third[0] and third[4].strip() == "1"
    assert "- learning_rate=0.001, seed 2 failed:" in table
    assert load_stored(tmp_path / "out" / "best.gin").optimizer.learning_rate == 2e-3
    assert "exit code 1" in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()[1]

    (tmp_path / "out" / "calls").write_text("")
    more = "OptimizerArgs.learning_rate = [2e-3, 4e-3, -1]"
    assert sweep_of(tmp_path, "--seeds", "2", grid=more) == 1
    assert (tmp_path / "out" / "calls").read_text().splitlines() == [f"learning_rate=0.004, seed {n}" for n in (1, 2)]
    assert "learning_rate=-1 failed" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("OptimizerArgs.learnin_rate = [1, 2]", "did you mean 'learning_rate'"),
        ("OptimizerArgs.learning_rate = [1e-3", "a bracket or a quote is not closed"),
        ("TrainerArgs.seed = [1, 2]", "is set by the sweep"),
        ("DatasetArgs.valid_items = [0]", "hold out both"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_refused(
    grid: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep_of(tmp_path, grid=grid) == 2 and told in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_file_of_a_sweep_that_was_stopped_repeats_its_numbers(tmp_path: Path) -> None:
    started = tmp_path / "out"
    threading.Thread(target=stop_when, args=(lambda: any(started.rglob("iteration_*")),)).start()
    grid = "OptimizerArgs.learning_rate = [1e-3, 1e-2]"
    assert sweep_of(tmp_path, "--threads", "1", grid=grid) == 128 + signal.SIGTERM
    assert sweep_of(tmp_path, "--threads", "1", grid=grid) == 0
    best = (started / "best.gin").read_text().splitlines()
    words = best[2].removeprefix("# OMP_NUM_THREADS=1 python ").split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment).returncode == 0
    (summary,) = (json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/summary.json"))
    assert f"valid NDCG@10 {summary['best']['value']!r}, test {summary['last_metrics']['test']['NDCG@10']!r}" in best[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """60 users with 10 to 39 ratings of 45 films, whose taste is for odd or for even ones."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    rows = ["user,film,stars,at"]
    for user in range(60):
        taste = rng.normal(size=2)
        for place, film in enumerate(rng.permutation(45)[: rng.integers(10, 40)]):
            stars = np.clip(np.rint(3.3 + taste[film % 2] + rng.normal(0, 0.7)), 1, 5)
            rows.append(f"{100 + user},{film},{int(stars)},{1_000_000_000 + 50_000 * user + 1800 * place}")
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    films = [f"{film},{'odd|all' if film % 2 else 'all'}" for film in range(45)]
    (folder / "films.csv").write_text("film,kinds\n" + "\n".join(films) + "\n")
    columns = InteractionColumns(
        interactions=folder / "events.csv", user="user", item="film", action="stars", time="at",
        items=folder / "films.csv", item_columns=("kinds",), lists={"kinds": "|"},
    )  # fmt: skip
    return SequenceStore.open(import_interactions("films", columns, output=folder / "films", running_statistics=True))


def test_all_ratings_of_training_users_are_labels_and_no_user_is_in_two_parts(store: SequenceStore) -> None:
    parts = [Labels.of(store, split, 1) for split in ("train", "valid", "test")]
    assert [len(np.unique(each.users)) for each in parts] == [36, 6, 18]
    assert len(np.unique(np.concatenate([each.users for each in parts]))) == 60
    offsets = np.asarray(store.offsets())
    for each in parts:  # no history has more than 200 ratings
        assert (each.events == offsets[each.users] + each.place).all()
        assert len(each.events) == np.diff(offsets)[np.unique(each.users)].sum()


def test_a_cut_in_time_divides_ratings_and_its_past_users(store: SequenceStore) -> None:
    train, valid, test = Labels.cut_in_time(store, 0.8, 1)
    times = np.asarray(store.sequence(str(store.timestamp_feature)))
    assert max(times[each.events].max() for each in (train, valid)) < times[test.events].min()
    assert not {*train.users} & {*valid.users}
    assert sorted(np.concatenate([train.events, valid.events, test.events])) == [*range(store.num_events)]


def test_auc_is_measured_over_all_labels_and_by_place() -> None:
    rng = np.random.default_rng(0)
    rating, place = rng.integers(1, 6, 600), np.tile(np.arange(150), 4)
    scores = rating + rng.normal(0, 2, 600)
    found = measure(scores, rating, place)
    assert found["AUC>=4"] == pytest.approx(roc_auc_score(rating >= 4, scores))
    here = (place >= 20) & (place < 50)
    assert found["AUC>=4, 21-50"] == pytest.approx(roc_auc_score(rating[here] >= 4, scores[here]))
    assert len(found) == 5


def test_the_newest_ratings_of_each_user_are_counted_however_long_its_history_is() -> None:
    users, events = np.repeat([7, 9], [250, 3]), np.concatenate([np.arange(1000, 1250), [3, 1, 2]])
    every = np.zeros_like(users)
    found = counted(Observations(users, every, every, every, every, every, events))
    assert (found.events == np.concatenate([np.arange(1050, 1250), [3, 1, 2]])).all()


def test_influences_have_the_deviation_of_auc_over_drawn_users() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), rng.integers(1, 30, 200))
    scores = np.round(rng.normal(size=200)[users] + rng.normal(size=len(users)), 1)
    is_liked = scores + 2 * rng.normal(size=len(users)) + rng.normal(size=200)[users] > 0
    rows = [np.flatnonzero(users == user) for user in range(200)]
    drawn = (np.concatenate([rows[user] for user in rng.integers(0, 200, 200)]) for _ in range(300))
    areas = [roc_auc_score(is_liked[each], scores[each]) for each in drawn]
    found = influences(scores, is_liked, users)
    assert abs(found.sum()) < 1e-12
    assert np.sqrt((found**2).sum()) == pytest.approx(np.std(areas), rel=0.1)


def test_a_statistic_is_measured_and_written_with_its_users(store: SequenceStore, tmp_path: Path) -> None:
    command = ["--store", str(store.path), "--seed", "1", "--output", str(tmp_path / "a.json")]
    assert main([*command, "--method", "baseline", "--per_user", str(tmp_path / "users.csv")]) == 0
    labels = Labels.of(store, "test", 1)
    is_liked = np.asarray(store.sequence("stars"))[labels.events] >= 4
    known = pd.Series(np.asarray(store.sequence("baseline"))[labels.events])
    assert known.isna().any()  # of the first day
    expected = roc_auc_score(is_liked, known.fillna(known.mean()))
    assert json.loads((tmp_path / "a.json").read_text())["metrics"]["AUC>=4"] == pytest.approx(expected)
    kept = pd.read_csv(tmp_path / "users.csv", index_col="user")
    assert sorted(kept.index - 100) == np.unique(labels.users).tolist() and kept["influence"].std() > 0


def test_unknown_methods_and_absent_libraries_are_named(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--store", str(store.path), "--method", "baselin"]) == 2
    assert "did you mean 'baseline'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert main(["--store", str(store.path), "--method", "lightgbm"]) == 2
    assert 'pip install ".[quality]"' in capsys.readouterr().err


@pytest.mark.parametrize("method", SPACES)
def test_trees_learn_which_films_a_user_likes(method: str, store: SequenceStore) -> None:
    pytest.importorskip(method)
    train, valid, test = (Labels.of(store, split, 1) for split in ("train", "valid", "test"))
    table, ratings = inputs(store), np.asarray(store.sequence("stars"))
    assert list(table)[-2:] == ["kinds 0", "kinds 1"] and table["kinds 0"].nunique() + table["kinds 1"].nunique() == 3
    trees = Trees(method, table, ratings, seed=1, threads=1)
    settings = {"learning_rate": 0.1} | ({"min_data_in_leaf": 20} if method == "lightgbm" else {})
    scores, found = trees.answers(trees.fit(settings, train, valid)[0], test)
    assert found["AUC>=4"] == roc_auc_score(ratings[test.events] >= 4, scores) > 0.6
    assert found["LOGLOSS"] < np.log(5)
