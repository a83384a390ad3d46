"""Signals to the processes of a run: what each stops, and what it leaves."""

import json
import signal
from pathlib import Path

import pytest

from tests.reliability.stops import stop
from tests.reliability.test_background import committed, run


@pytest.mark.parametrize("fault", ["SIGTERM to all processes", "Ctrl-C"])
def test_a_signal_to_ranks_and_workers_saves_the_current_iteration_and_exits_with_0(
    store: str, tmp_path: Path, fault: str
) -> None:
    trainer = {"data_workers": 2, "max_train_iters": 1000, "ckpt_save_interval": 100}
    ranks = run(2, store, tmp_path, fault, 7, **trainer)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert list(committed(tmp_path)) == [7]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    name = fault.split()[0] if "SIG" in fault else "SIGINT"
    assert f"{name}: stopping after iteration 7" in ranks[0].output
    assert "Traceback" not in ranks[0].output + ranks[1].output


def test_the_second_interrupt_ends_the_run_at_once_without_a_traceback(store: str, tmp_path: Path) -> None:
    (rank,) = run(1, store, tmp_path, "Ctrl-C twice", 7, data_workers=1, max_train_iters=1000, ckpt_save_interval=100)
    assert rank.exit_code == -signal.SIGINT
    assert "Ctrl-C again ends the run at once" in rank.output and "Traceback" not in rank.output
    assert not committed(tmp_path)


@pytest.mark.parametrize(("ranks", "fault"), [(1, "worker lost soon"), (2, "worker lost soon")])
def test_a_killed_data_worker_ends_the_run_with_a_message(store: str, tmp_path: Path, ranks: int, fault: str) -> None:
    ended = run(ranks, store, tmp_path, fault, 7, data_workers=2, max_train_iters=100_000, ckpt_save_interval=100_000)
    assert [rank.exit_code for rank in ended] == [1, 3][-ranks:], ended[-1].output
    assert "error: a data worker died (DataLoader worker" in ended[-1].output
    assert "Traceback" not in ended[-1].output


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_workers_end_with_torchrun(
    store: str, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    stopped = stop(number, Path(store), tmp_path / "run", ranks=1, workers=1)
    assert not stopped.problems, stopped.output
    assert stopped.exit_code == exit_code
