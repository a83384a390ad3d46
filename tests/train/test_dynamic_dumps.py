"""Dynamic tables for other tools: dumps of what has changed since a step, and what comes back from a file."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from hstu.checkpoint.dynamic import read_table
from hstu.checkpoint.export import describe, export
from hstu.checkpoint.tensors import load_safetensors, read_metadata
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.throughput import PeakTflops
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from scripts.dynamic_table import main
from tests.train.tiny import FinishedRun, run, tables_with_dynamic, tiny_config

Train = Callable[..., FinishedRun]
ROWS, TABLE = 10, "movies"


@pytest.fixture(scope="module")
def finished(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of six batches, with a checkpoint after every second one."""
    saving = {"ckpt_save_interval": 2, "max_train_iters": 6, "train_batch_size": 1}
    output, tables = tmp_path_factory.mktemp("dumps"), tables_with_dynamic(store, rows=ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.train.builder.peak_tflops", lambda *_: PeakTflops(1.0, "assumed"))
        return run(tiny_config("ranking", store, output, tables=tables, trainer=saving), mesh)


@pytest.fixture(scope="module")
def checkpoints(finished: FinishedRun) -> Path:
    return finished.path.parent / "checkpoints"


def test_a_dump_has_raw_ids_and_what_has_changed_since_a_step(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deeper" / "new.parquet"
    command = ["export", "--ckpt", str(checkpoints), "--table", TABLE, "--parquet", str(path)]
    assert main([*command, "--since-step", "4"]) == 0
    assert "export later changes with --since-step 6" in capsys.readouterr().out
    (content,) = read_table(checkpoints / "iteration_00000006", TABLE)
    dumped = pq.read_table(path)
    assert dumped["id"].to_pylist() == content.ids[content.changed > 4].tolist()
    assert dumped["raw_id"].to_pylist() == [1000 + code for code in dumped["id"].to_pylist()]
    assert main([*command[:-1], str(path / "below")]) == 3
    assert "below cannot be written: " in capsys.readouterr().err


def test_an_export_has_the_ids_in_order_with_the_rows_of_the_live_table(
    finished: FinishedRun, checkpoints: Path, tmp_path: Path
) -> None:
    exported = export(checkpoints / "iteration_00000006", tmp_path / "exported")
    tensors, live = (
        load_safetensors(exported / "model.safetensors"),
        dynamic_tables(finished.trainer.state.model)[TABLE],
    )
    ids, rows = tensors["dynamic.movies.ids"], tensors["dynamic.movies.weight"]
    assert ids.dtype == torch.int64 and ids.tolist() == sorted(live.slots.content()[0].tolist())
    assert torch.equal(rows, live.content().rows[live.slots.lookup(ids)]) and rows.any(1).all()
    told = read_metadata(exported)
    assert told["tables"][TABLE] == {"rows": ROWS, "dim": 16, "features": ["item_id"], "dynamic": True}
    described = {"shape": [ROWS, 16], "dtype": "float32", "is_average": False}
    assert told["tensors"]["dynamic.movies.weight"] == described
    assert any(f"dynamic table movies   {ROWS} ids × 16 of item_id" in line for line in describe(exported))
