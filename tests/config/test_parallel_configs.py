"""The files in configs/ that are about several ranks, by the entry scripts on two ranks for some iterations."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hstu.config.gin_io import load
from hstu.data.preprocess import preprocess
from hstu.observe.records import read_metrics
from tests.distributed.scripts import run_script

RATINGS = 20_000  # of some 130 users
STEPS = 3
SHORT = {
    "TrainerArgs.num_train_epochs": None,
    "TrainerArgs.max_train_iters": STEPS,
    "TrainerArgs.log_interval": 1,
    "TrainerArgs.train_batch_size": 8,
    "TrainerArgs.eval_batch_size": 8,
    "TrainerArgs.max_eval_iters": 1,
    "TrainerArgs.eval_at_end": True,
    "TrainerArgs.tensorboard": False,
}


@pytest.fixture(scope="module")
def ml_1m(raw_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the first users of the real MovieLens 1M."""
    raw = tmp_path_factory.mktemp("raw") / "ml-1m"
    raw.mkdir()
    for name in ("users.dat", "movies.dat"):
        (raw / name).symlink_to(raw_data_dir / "ml-1m" / name)
    with (raw_data_dir / "ml-1m" / "ratings.dat").open() as whole:
        (raw / "ratings.dat").write_text("".join(next(whole) for _ in range(RATINGS)))
    return preprocess("ml-1m", raw_path=raw, output=tmp_path_factory.mktemp("stores") / "ml-1m")


def train_on_two_ranks(name: str, directory: Path, bindings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run configs/``name`` with ``bindings`` to its end; the records of its metrics.jsonl."""
    task = "retrieval" if "retrieval" in name else "ranking"
    places = {"output_dir": directory, "ckpt_save_dir": directory / "checkpoints"}
    given = SHORT | bindings | {f"TrainerArgs.{name}": str(place) for name, place in places.items()}
    command = [f"pretrain_gr_{task}.py", "--gin-config-file", f"configs/{name}", "--gin-bindings"]
    codes, output = run_script(*command, *(f"{option} = {value!r}" for option, value in given.items()), ranks=2)
    assert codes == [0, 0], output
    assert "2 rank(s)" in (directory / "log.txt").read_text()
    assert json.loads((directory / "summary.json").read_text())["status"] == "done"
    return read_metrics(directory / "metrics.jsonl")


def check(records: list[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Every step has a loss, and the run all the metrics of its file, each a number."""
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses) and len(set(losses)) == STEPS
    evaluated = [record["metrics"] for record in records if record["kind"] == "eval"]
    assert evaluated and all(set(each) >= set(metrics) for each in evaluated)
    assert all(math.isfinite(value) for each in evaluated for value in each.values())


@pytest.mark.parametrize("name", ["ml_1m_ranking_tp2.gin", "ml_1m_retrieval_prefetch.gin"])
def test_a_movielens_file_for_several_ranks_trains_on_two(name: str, ml_1m: Path, tmp_path: Path) -> None:
    records = train_on_two_ranks(name, tmp_path / "run", {"DatasetArgs.dataset_path": str(ml_1m)})
    config = load([str(tmp_path / "run" / "operative.gin")], [], "retrieval" if "retrieval" in name else "ranking")
    assert config.tensor_parallel.tensor_model_parallel_size == (2 if "tp2" in name else 1)
    assert config.network.sequence_parallel == ("tp2" in name)
    assert config.trainer.pipeline_type == ("prefetch" if "prefetch" in name else "none")
    check(records, config.task_args.eval_metrics)
