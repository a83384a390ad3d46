"""Runs whose item table starts with the vectors of a file."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.config.run_config import RunDraft
from hstu.data.store.sequence_store import SequenceStore
from hstu.estimate.opened import Opened
from hstu.estimate.preflight import initial_rows_can_be_read
from hstu.parallel.mesh import Mesh
from hstu.train.trainer import Trainer
from tests.train.tiny import FinishedRun, build, tables_of, tiny_config

WIDTH = 5
GIVEN = np.arange(4)
"""Codes of items; their raw ids are 1000 more."""
VECTORS = (10 + np.arange(len(GIVEN) * WIDTH, dtype=np.float32)).reshape(-1, WIDTH)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": 1000 + GIVEN, "vector": VECTORS.tolist()}), path)
    return path


def tables(store: SequenceStore, initial_rows: Path | None, sharded: bool = True) -> Any:
    """Those of a tiny run, of which the item's starts with ``initial_rows``."""
    path = None if initial_rows is None else str(initial_rows)
    plain = tables_of(store, sharded=("item_id",) if sharded else ())
    return tuple(replace(table, initial_rows=path) if table.feature_names == ["item_id"] else table for table in plain)


def item_rows(trainer: Trainer) -> torch.Tensor:
    tensor: Any = trainer.state.tensors()["model.tables.item_id_table"]
    rows: torch.Tensor = tensor if isinstance(tensor, torch.Tensor) else next(iter(tensor.shards.values()))
    return rows.clone()


@pytest.mark.parametrize("sharded", [True, False])
def test_a_run_starts_with_the_vectors_of_the_file(
    sharded: bool, mesh: Mesh, store: SequenceStore, tmp_path: Path, file: Path
) -> None:
    def started(name: str, initial_rows: Path | None) -> Trainer:
        chosen, averaged = tables(store, initial_rows, sharded), {"ema_decay": 0.9}
        return build(tiny_config("ranking", store, tmp_path / name, tables=chosen, optimizer=averaged), mesh)

    expected, trainer = item_rows(started("without", None)), started("with", file)
    expected[GIVEN, :WIDTH] = torch.from_numpy(VECTORS)
    assert torch.equal(item_rows(trainer), expected)
    with trainer.state.optimizers.averaged_weights():
        assert torch.equal(item_rows(trainer), expected), "the moving average starts with them, too"


def test_a_checkpoint_replaces_them_and_a_run_that_resumes_does_without_the_file(
    train: Callable[..., FinishedRun], store: SequenceStore, file: Path, tmp_path: Path
) -> None:
    chosen = tables(store, file)
    whole = train("ranking", tables=chosen)
    first = train("ranking", tables=chosen, output="cut", trainer={"ckpt_save_interval": 2, "max_train_iters": 2})
    loaded = {"ckpt_load_dir": str(tmp_path / "cut" / "checkpoints"), "ckpt_load_optimizer": False}
    other = train("ranking", tables=chosen, trainer={**loaded, "max_train_iters": 1}, optimizer={"learning_rate": 1e-9})
    torch.testing.assert_close(item_rows(other.trainer), item_rows(first.trainer))
    file.unlink()
    resumed = train("ranking", tables=chosen, output="cut", trainer={"ckpt_load_dir": "auto", "ckpt_save_interval": 2})
    assert resumed.losses[-2:] == whole.losses[-2:]
    with pytest.raises(ConfigError, match=r"initial_rows = '.*rows.parquet': there is no such file"):
        train("ranking", tables=chosen)


def test_a_file_that_does_not_fit_is_found_before_the_run(store: SequenceStore, tmp_path: Path, file: Path) -> None:
    def problems(initial_rows: Path, **network: Any) -> list[str]:
        config = tiny_config("ranking", store, tmp_path / "run", tables=tables(store, initial_rows), network=network)
        draft = RunDraft(**vars(config), world_size=1)
        return [str(problem) for problem in initial_rows_can_be_read(draft, Opened(draft))]

    assert problems(file) == []
    (narrow,) = problems(file, item_embedding_dim=4)
    assert re.search(r"initial_rows = '.*rows.parquet': the vectors have 5 numbers and the rows of the table 4", narrow)
    (absent,) = problems(tmp_path / "none.parquet")
    assert "initial_rows = " in absent and "there is no such file" in absent
