"""Dynamic tables in whole runs: what is logged, what a checkpoint has, and what other tools get of it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.export import describe, export
from hstu.checkpoint.tensors import load_safetensors, read_metadata
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.dynamic.slots import steps_of
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from scripts.dynamic_table import main
from tests.train.tiny import ITEMS, FinishedRun, Train, run, tables_with_dynamic, tiny_config

ROWS, TABLE = 10, "movies"


def test_a_table_with_room_for_all_items_fills_and_evicts_nothing(train: Train, store: SequenceStore) -> None:
    reports = train("ranking", tables=tables_with_dynamic(store, rows=ITEMS)).records
    tables = [record["tables"]["movies"] for record in reports if record["kind"] == "train"]
    assert tables[-1]["rows"] <= ITEMS and tables[-1]["capacity"] == ITEMS
    assert all(report["evictions"] == report["rejections"] == 0 for report in tables)
    assert tables[0]["hit_rate"] < tables[-1]["hit_rate"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "none"])
def test_a_run_that_goes_on_from_a_checkpoint_loses_no_row(train: Train, store: SequenceStore, policy: str) -> None:
    limit = 1 if policy == "none" else None
    options = {
        "tables": tables_with_dynamic(
            store, rows=8, evict_strategy=policy, admission_threshold=3 - bool(limit), expire_iters=limit
        ),
        "optimizer": {"optimizer_str": "adam"},
    }
    sizes = {"train_batch_size": 1 if limit else 8}
    straight = train("ranking", trainer=sizes | {"max_train_iters": 8}, **options)
    saving = {"max_train_iters": 4, "ckpt_save_interval": 4}
    train("ranking", output="resumed", trainer=sizes | saving, **options)
    going_on = {"max_train_iters": 8, "ckpt_load_dir": "auto"}
    resumed = train("ranking", output="resumed", trainer=sizes | going_on, **options)
    assert resumed.losses[-4:] == pytest.approx(straight.losses[-4:], rel=1e-6)
    content = dynamic_tables(straight.trainer.state.model)["movies"].content()
    assert torch.equal(content.changed, steps_of(content.policy, content.scores)), "also where an id has moved"
    reports = [record["tables"]["movies"] for record in straight.records]
    assert reports[0]["waiting"] > 0
    assert (policy == "none") == any(report["expirations"] for report in reports)


def test_vectors_of_new_items_have_a_direction(train: Train, store: SequenceStore) -> None:
    with pytest.raises(ConfigError, match=r"initializer .*vectors of new items of 'movies' would be zeros.*item_tower"):
        train("retrieval", tables=tables_with_dynamic(store, rows=ITEMS, initializer="zeros"))


@pytest.fixture(scope="module")
def finished(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of six batches, with a checkpoint at its end."""
    saving = {"ckpt_save_interval": 6, "max_train_iters": 6, "train_batch_size": 1}
    output, tables = tmp_path_factory.mktemp("dumps"), tables_with_dynamic(store, rows=ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.train.builder.peak_tflops", lambda *_: (1.0, "assumed"))
        return run(tiny_config("ranking", store, output, tables=tables, trainer=saving), mesh)


@pytest.fixture(scope="module")
def checkpoint(finished: FinishedRun) -> Path:
    return finished.path.parent / "checkpoints" / "iteration_00000006"


def test_tables_go_to_parquet_with_raw_ids_and_what_has_changed_since_a_step(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (content,) = read_tables(checkpoint)[TABLE]
    whole, new = tmp_path / "whole.parquet", tmp_path / "deeper" / "new.parquet"
    begin = ["export", "--ckpt", str(checkpoint.parent), "--table", TABLE, "--parquet"]
    assert main([*begin, str(whole)]) == 0
    exported = pq.read_table(whole)
    assert exported["id"].to_pylist() == content.ids.tolist()
    assert exported["raw_id"].to_pylist() == [1000 + code for code in content.ids.tolist()]
    assert np.array_equal(np.array(exported["row"].to_pylist(), np.float32), content.rows.numpy())

    assert main([*begin, str(new), "--since-step", "4"]) == 0
    assert "export later changes with --since-step 6" in capsys.readouterr().out
    newest = content.changed > 4
    assert 0 < newest.sum() < len(newest)
    assert pq.read_table(new)["id"].to_pylist() == content.ids[newest].tolist()

    assert main([*begin, str(new / "below")]) == 3
    assert "below cannot be written: " in capsys.readouterr().err
    assert main(["export", "--ckpt", str(checkpoint), "--table", "films", "--parquet", str(new)]) == 3
    assert "has no dynamic table 'films'; it has movies" in capsys.readouterr().err


def test_an_export_has_the_ids_in_order_with_the_rows_of_the_live_table(
    finished: FinishedRun, checkpoint: Path, tmp_path: Path
) -> None:
    exported = export(checkpoint, tmp_path / "exported")
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
    for place in (checkpoint, exported):
        assert any(f"dynamic table movies   {ROWS} ids × 16 of item_id" in line for line in describe(place))


def test_rows_that_were_negatives_alone_have_changed_too(train: Train, store: SequenceStore) -> None:
    finished = train(
        "retrieval",
        tables=tables_with_dynamic(store, rows=ITEMS),
        trainer={"train_batch_size": 1, "max_train_iters": 12},
        task_args={"negatives": "full"},
    )
    content = dynamic_tables(finished.trainer.state.model)["movies"].content()
    last_seen = steps_of(content.policy, content.scores)
    assert (content.changed == 12).all() and (last_seen < 12).any()
