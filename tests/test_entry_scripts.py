"""The commands of the README in processes of their own, on own data with string ids.

What is about the way in which they are started is started so; the rest is forked (tests/distributed/launch.py).
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hstu.observe.records import read_metrics
from tests.config.gin_files import table, text
from tests.distributed.launch import run_script
from tests.train.tiny import ITEMS, walks

REPOSITORY = Path(__file__).resolve().parents[1]
RANKING, RETRIEVAL = "pretrain_gr_ranking.py", "pretrain_gr_retrieval.py"
TIMEOUT_S = 150.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

GIN = """
TrainerArgs.train_batch_size = 4
TrainerArgs.eval_batch_size = 4
TrainerArgs.max_train_iters = 6
TrainerArgs.log_interval = 2
TrainerArgs.eval_interval = 3
TrainerArgs.pipeline_type = "none"

DatasetArgs.dataset_name = "criteo"
DatasetArgs.max_history_seqlen = 8
DatasetArgs.shuffle = True

NetworkArgs.num_layers = 1
NetworkArgs.hidden_size = 16
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 8
NetworkArgs.dtype_str = "float32"
NetworkArgs.kernel_backend = "pytorch"

OptimizerArgs.optimizer_str = "adam"
OptimizerArgs.learning_rate = 0.01
""" + text(
    [
        *table("ads", 11, feature_names=["ad"], sharding_type="model_parallel"),
        *table("clicks", 2, feature_names=["clicked"], sharding_type="data_parallel"),
        *table("towns", 3, feature_names=["town"], sharding_type="data_parallel"),
    ]
)
TASK = {
    RANKING: 'RankingArgs.prediction_head_arch = [8, 1]\nRankingArgs.eval_metrics = ("AUC")\n'
    "TrainerArgs.ckpt_save_interval = -1\n",
    RETRIEVAL: 'RetrievalArgs.eval_metrics = ("HR@3", "MRR")\nTrainerArgs.ckpt_save_interval = 100\n',
}


def start(*command: Any) -> subprocess.Popen[str]:
    """A python process that leads a session of its own, with one thread, in the repository."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output, errors


def python(*command: Any) -> tuple[int, str, str]:
    return finish(start(*command))


def bindings(**values: Any) -> list[str]:
    """``Class__parameter=value`` as --gin-bindings; a mapping of what a test changes."""
    return ["--gin-bindings", *(f"{name.replace('__', '.')} = {value!r}" for name, value in values.items())]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The walks as CSV files with string ids, and the store that the script of the repository has made of them."""
    path = tmp_path_factory.mktemp("own-data")
    data = walks()
    with (path / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reader", "ad", "clicked", "at"])
        for user, row in enumerate(data["items"]):
            writer.writerows([f"user-{user:02}", f"ad-{item:02}", item % 2, 60 * at] for at, item in enumerate(row))
    with (path / "readers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reader", "town"])
        writer.writerows([f"user-{user:02}", ["Ulm", "Bonn", "Kiel"][user % 3]] for user in range(len(data["items"])))
    command = ["scripts/preprocess_dataset.py", "--dataset_name", "criteo", "--output", path / "criteo"]
    columns = ["--user", "reader", "--item", "ad", "--action", "clicked", "--time", "at"]
    context = ["--context", path / "readers.csv", "--context_columns", "town"]
    codes, output = run_script(*command, "--interactions", path / "events.csv", *columns, *context)
    assert codes == [0], output
    assert f"items {ITEMS}" in output
    for script, lines in TASK.items():
        place_of_data = f"DatasetArgs.dataset_path = '{path / 'criteo'}'\n"
        (path / script.replace(".py", ".gin")).write_text(GIN + place_of_data + lines)
    return path


def arguments(script: str, place: Path, output: str, **values: Any) -> list[Any]:
    """Command line of a run into ``place``/``output``."""
    given = {"TrainerArgs__output_dir": str(place / output), **values}
    return [script, "--gin-config-file", place / script.replace(".py", ".gin"), *bindings(**given)]


@pytest.fixture(scope="module")
def ranking(place: Path) -> tuple[Path, str, str]:
    """A finished ranking run by plain python: its directory, and what it said."""
    code, output, errors = python(*arguments(RANKING, place, "ranking"))
    assert code == 0, errors
    return place / "ranking", output, errors


@pytest.fixture(scope="module")
def retrieval(place: Path) -> tuple[Path, str, str]:
    """A finished retrieval run by two ranks."""
    checkpoints = str(place / "retrieval" / "checkpoints")
    command = arguments(RETRIEVAL, place, "retrieval", TrainerArgs__ckpt_save_dir=checkpoints)
    code, output, errors = python(*TORCHRUN, *command)
    assert code == 0, errors
    return place / "retrieval", output, errors


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_directory(ranking: tuple[Path, str, str]) -> None:
    directory, _, _ = ranking
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "run.json",
        "operative.gin",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "log.txt",
        "tensorboard",
    }
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.stat().st_size > 100 for path in (directory / "tensorboard").iterdir())


def test_metrics_have_their_schema(ranking: tuple[Path, str, str]) -> None:
    records = [json.loads(line) for line in (ranking[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["iter"]) for record in records] == [
        ("train", 2),
        ("eval", 3),
        ("train", 4),
        ("train", 6),
        ("eval", 6),
    ]
    measured = {"epoch", "loss", "lr", "lr_tables", "grad_norm", "grad_norm_tables", "samples_per_s", "tokens_per_s"}
    measured |= {"tflops", "mfu", "data_wait", "memory_bytes"}
    for record in records:
        if record["kind"] == "train":
            assert set(record) == {"kind", "iter", "time_s"} | measured
        else:
            assert set(record) == {"kind", "iter", "epoch", "split", "metrics"}
            assert set(record["metrics"]) == {"AUC"}


def test_the_terminal_shows_what_the_log_keeps(ranking: tuple[Path, str, str]) -> None:
    directory, output, errors = ranking
    kept = (directory / "log.txt").read_text()
    for said in ("iter 6/6", "eval valid at iter 6", "14 users, 14 samples"):
        assert said in output and said in kept
    assert "Traceback" not in errors and "Warning" not in errors


def test_two_ranks_write_one_run(retrieval: tuple[Path, str, str]) -> None:
    directory, output, _ = retrieval
    assert output.count("iter 6/6") == 1
    assert "2 rank(s)" in output
    records = read_metrics(directory / "metrics.jsonl")
    assert [(r["iter"], r["split"]) for r in records if r["kind"] == "eval"] == [
        (3, "valid"),
        (6, "valid"),
        (6, "test"),
    ]
    assert [path.name for path in (directory / "checkpoints").glob("iter*")] == ["iteration_00000006"]


def test_the_benchmark_runs_small(tmp_path: Path) -> None:
    small = {
        "NetworkArgs__num_layers": 1,
        "NetworkArgs__hidden_size": 32,
        "NetworkArgs__kv_channels": 8,
        "items/FeatureArgs__max_sequence_length": 16,
        "item/EmbeddingArgs__item_vocab_size_or_capacity": 100,
        "user/EmbeddingArgs__item_vocab_size_or_capacity": 100,
        "TrainerArgs__max_train_iters": 3,
        "TrainerArgs__train_batch_size": 4,
        "TrainerArgs__log_interval": 1,
        "BenchmarkDatasetArgs__num_generated_batches": 2,
        "TrainerArgs__output_dir": str(tmp_path / "run"),
        "TrainerArgs__ckpt_save_interval": -1,
        "TrainerArgs__tensorboard": False,
    }
    codes, output = run_script(RANKING, "--gin-config-file", "configs/benchmark_ranking.gin", *bindings(**small))
    assert codes == [0], output
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    assert "MFU" in output


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [RANKING, RETRIEVAL])
def test_validating_is_quick(place: Path, script: str) -> None:
    begun = time.monotonic()
    file = place / script.replace(".py", ".gin")
    code, output, _ = python(script, "--gin-config-file", file, "--validate-only", "--quick")
    assert code == 0 and output.startswith("OK: ")
    assert time.monotonic() - begun < 3.0


def test_validating_opens_what_the_file_names_and_leaves_nothing_behind(place: Path) -> None:
    command = [*arguments(RANKING, place, "validated"), "--validate-only"]
    codes, output = run_script(*command)
    assert (codes, output.startswith("OK: ")) == ([0], True), output
    assert not (place / "validated").exists()
    wrong = bindings(
        ads__EmbeddingArgs__item_vocab_size_or_capacity=10, TrainerArgs__ckpt_load_dir="nowhere", TrainerArgs__seeds=1
    )
    wrong[1] = wrong[1].replace("ads.", "ads/")
    codes, output = run_script(*command, *wrong)
    assert codes == [2]
    assert output.startswith("bad configuration, 3 problems:") and "Traceback" not in output, output
    for said in ("must be at least 11", "no complete checkpoint in nowhere", "has no parameter seeds"):
        assert output.count(said) == 1


def test_missing_data_is_exit_code_3(place: Path) -> None:
    values = {"DatasetArgs__dataset_path": str(place / "nowhere"), "TrainerArgs__tensorboard": False}
    codes, output = run_script(*arguments(RETRIEVAL, place, "no-data", **values))
    assert codes == [3]
    assert output.count(f"error: no preprocessed data at {place / 'nowhere'}") == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_two_ranks_tell_once_of_what_the_main_one_alone_finds(place: Path) -> None:
    values = {"TrainerArgs__tensorboard": False, "TrainerArgs__output_dir": str(place / "events.csv" / "run")}
    code, _, errors = python(*TORCHRUN, *arguments(RETRIEVAL, place, "failed", **values))
    assert code != 0
    assert errors.count("error: TrainerArgs.output_dir") == errors.count("error: ") == 1
    assert re.search(r"exitcode\s*:\s*2", errors)


PAUSE = """
import importlib.abc, sys, time

class Pause(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("hstu."):  # the first of our modules
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Pause())
"""


TOOLS = "estimate export inspect_checkpoint preprocess_dataset quickstart_report recommend"


@pytest.mark.parametrize("script", [RANKING, RETRIEVAL, *(f"scripts/{tool}.py" for tool in TOOLS.split())])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(script: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    process = subprocess.Popen(
        [sys.executable, script, "--help"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")  # a shell says 130
