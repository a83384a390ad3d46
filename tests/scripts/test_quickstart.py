"""The quick start: its script, with a Python that only notes what it was asked, and the baseline of its report.

Popularity is compared with loops on a toy store, and with its figures on real data.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config.args import DatasetArgs
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import SequenceStore
from scripts.quickstart_report import _popularity_ranks, popularity_baseline
from tests.conftest import REPOSITORY, MakeStore
from tests.helpers import begin_script
from tests.serve.http_server import until

FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *SequenceStore*) [ -e tmp_data/ml-100k ] ;;
    *preprocess_dataset.py*) echo preprocess >>calls.txt; mkdir -p tmp_data/ml-100k ;;
    *pretrain_gr_retrieval.py*)
        echo train >>calls.txt
        echo "$*" >command.txt
        if [ -e slow ]; then sleep 30; fi
        if [ -e fail ]; then exit 3; fi
        mkdir -p runs/quickstart
        echo "{\\"status\\": \\"$(cat status)\\"}" >runs/quickstart/summary.json ;;
    *quickstart_report.py*) echo report >>calls.txt; echo "HR@10 0.1" ;;
esac
"""


class Machine:
    """A repository in which everything but quickstart.sh is pretended."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for directory in ("scripts", ".venv/bin", "configs"):
            (root / directory).mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "quickstart.sh", root / "scripts")
        (root / "configs" / "ml_100k_retrieval.gin").write_text("TrainerArgs.seed = 1\n")
        (root / "status").write_text("done")
        for path, text in (("scripts/install.sh", "#!/bin/bash\n"), (".venv/bin/python", FAKE_PYTHON)):
            (root / path).write_text(text)
            (root / path).chmod(0o755)

    def begin(self) -> subprocess.Popen[str]:
        env = {"PATH": os.defpath + ":/usr/bin:/bin"}
        return begin_script(self.root / "scripts" / "quickstart.sh", cwd=Path("/"), env=env)

    def quickstart(self) -> tuple[int, str, list[str]]:
        """Exit code, output, and what was run."""
        calls = self.root / "calls.txt"
        calls.unlink(missing_ok=True)
        process = self.begin()
        output = process.communicate(timeout=60)[0]
        return process.returncode, output, calls.read_text().split() if calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_from_nothing_it_preprocesses_trains_and_reports(machine: Machine) -> None:
    code, output, calls = machine.quickstart()
    assert code == 0, output
    assert calls == ["preprocess", "train", "report"]
    assert [line.split()[0] for line in output.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]", "HR@10"]
    command = (machine.root / "command.txt").read_text()
    assert "--gin-config-file configs/ml_100k_retrieval.gin" in command
    assert "TrainerArgs.output_dir = 'runs/quickstart'" in command


def test_again_it_only_reports(machine: Machine) -> None:
    machine.quickstart()
    code, output, calls = machine.quickstart()
    assert (code, calls) == (0, ["report"])
    assert "done before" in output


def test_a_changed_configuration_is_trained_anew(machine: Machine) -> None:
    machine.quickstart()
    (machine.root / "configs" / "ml_100k_retrieval.gin").write_text("TrainerArgs.seed = 2\n")
    assert machine.quickstart()[2] == ["train", "report"]


def test_a_training_that_was_stopped_is_not_taken_for_done(machine: Machine) -> None:
    (machine.root / "status").write_text("stopped")
    machine.quickstart()
    (machine.root / "status").write_text("done")
    assert machine.quickstart()[2] == ["train", "report"]


def test_a_failure_says_which_step_and_keeps_its_exit_code(machine: Machine) -> None:
    (machine.root / "fail").touch()
    code, output, calls = machine.quickstart()
    assert (code, calls) == (3, ["preprocess", "train"])
    assert "failed at: training (exit code 3)" in output


def test_interrupted_it_says_so_and_goes_on_when_run_again(machine: Machine) -> None:
    (machine.root / "slow").touch()
    process = machine.begin()
    until((machine.root / "command.txt").exists)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130, output
    assert "interrupted during: training" in output

    (machine.root / "slow").unlink()
    code, _, calls = machine.quickstart()
    assert (code, calls) == (0, ["train", "report"])


# --- the popularity baseline of its report ---


def args(**options: Any) -> DatasetArgs:
    defaults: dict[str, Any] = {"dataset_name": "toy", "max_sequence_length": 200, "valid_items": 0}
    return DatasetArgs(**(defaults | options))


def test_popularity_ranks_equal_a_loop_over_users(make_store: MakeStore) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 12, rng.integers(2, 20)).tolist() for _ in range(40)]
    store = make_store(histories, num_items=14)
    test = build_samples(store, args(), "retrieval", "test", seed=0)
    counts = rng.integers(0, 4, 14)
    expected = []
    for *seen, target in histories:
        rivals = [counts[item] for item in range(14) if item not in seen and item != target]
        expected.append(1 + sum(c > counts[target] for c in rivals) + sum(c == counts[target] for c in rivals) / 2)
    items = np.asarray(store.sequence(store.item_feature))
    np.testing.assert_array_equal(_popularity_ranks(counts, items, test), expected)


def test_popularity_counts_training_events_only_and_all_of_them(make_store: MakeStore) -> None:
    # Item 0 is popular among held-out items only; item 1 among events that truncation drops.
    store = make_store([[1, 1, 1, 2, 3, 0], [1, 4, 3, 0], [2, 3, 1]], num_items=5)
    data = args(max_sequence_length=2)
    train, test = (build_samples(store, data, "retrieval", split, seed=0) for split in ("train", "test"))
    # Counts 1: 4, 3: 3, 2: 2, 4: 1, 0: 0. User 2 has seen 2 and 3: item 1 is first. The others' unseen items but
    # the target 0 are 4 for user 0 and 2 for user 1: rank 2.
    assert popularity_baseline(store, train, test, ["MRR"])["MRR"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_popularity_on_movielens_100k(ml_100k_store: SequenceStore) -> None:
    train, test = (build_samples(ml_100k_store, args(), "retrieval", split, seed=0) for split in ("train", "test"))
    result = popularity_baseline(ml_100k_store, train, test, ["HR@10", "NDCG@10"])
    assert result == {"HR@10": pytest.approx(0.086, abs=5e-4), "NDCG@10": pytest.approx(0.044, abs=5e-4)}
