"""What the builder decides, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import TrainerArgs
from hstu.config.gin_io import load
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.collectives import on_all_ranks
from hstu.parallel.mesh import Mesh
from hstu.train.trainer import total_iters
from tests.train.tiny import Train, build, tiny_config


@pytest.mark.parametrize(
    ("options", "batches_per_epoch", "iterations"),
    [
        ({}, 7, 7),
        ({"max_train_iters": 3}, 7, 3),
        ({"max_train_iters": 30}, 7, 30),
        ({"num_train_epochs": 2.0}, 7, 14),
        ({"num_train_epochs": 0.5}, 7, 4),  # half a batch is a batch
        ({"num_train_epochs": 1.25}, 4, 5),
        ({"num_train_epochs": 0.001}, 7, 1),
        ({"num_train_epochs": 0.7}, 10, 7),  # as floats, 0.7 * 10 and 1.1 * 10 are a little more than 7 and 11
        ({"num_train_epochs": 1.1}, 10, 11),
    ],
)
def test_a_run_lasts_its_iterations_or_its_epochs_or_one_epoch(
    options: dict[str, Any], batches_per_epoch: int, iterations: int
) -> None:
    assert total_iters(TrainerArgs(train_batch_size=1, eval_batch_size=1, **options), batches_per_epoch) == iterations


def test_a_fraction_of_the_epochs_is_trained(train: Train) -> None:
    finished = train("retrieval", trainer={"max_train_iters": None, "num_train_epochs": 1.5})  # of 3 batches
    assert finished.summary["iterations"] == 5
    assert finished.records[-1]["epoch"] == pytest.approx(5 / 3)


def test_a_part_that_matches_no_weight_is_told_as_a_mistake_of_the_file(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    file = tmp_path / "run.gin"
    file.write_text(tiny_config("ranking", store, tmp_path).operative_gin() + "head/PartOptimizerArgs.regex = 'haed'\n")
    parts = "OptimizerArgs.part_optimizers = [@head/PartOptimizerArgs()]"
    with pytest.raises(ConfigError) as told:
        build(load([str(file)], [parts], "ranking"), mesh)
    line = len(file.read_text().splitlines())
    expected = f"{file}:{line}: head/PartOptimizerArgs.regex = 'haed': matches no dense weight"
    assert expected in str(told.value)
    assert "task.encoder.stack.layers.N.uvqk.weight, " in str(told.value)


def test_a_run_directory_that_cannot_be_made_is_a_readable_error(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"TrainerArgs\.output_dir"):
        build(tiny_config("ranking", store, tmp_path, trainer={"output_dir": f"{tmp_path}/file/run"}), mesh)


def test_a_mistake_that_one_rank_finds_is_raised_and_other_errors_pass_through(mesh: Mesh) -> None:
    def fails(error: Exception) -> None:
        raise error

    assert on_all_ranks(lambda: 3, mesh.world_group) == 3
    with pytest.raises(DataError, match="this host's disk"):
        on_all_ranks(lambda: fails(DataError("this host's disk")), mesh.world_group)
    with pytest.raises(ZeroDivisionError):
        on_all_ranks(lambda: fails(ZeroDivisionError()), mesh.world_group)
