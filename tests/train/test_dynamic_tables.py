"""Dynamic tables in whole runs: what is logged, what a checkpoint has, and what other tools get of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hstu.checkpoint.dynamic import read_table
from hstu.checkpoint.export import describe
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.dynamic.slots import steps_of
from hstu.parallel.tables import dynamic_tables
from scripts.dynamic_table import main
from tests.train.tiny import ITEMS, FinishedRun, tables_with_dynamic

Train = Callable[..., FinishedRun]


def test_a_table_with_room_for_all_items_fills_and_evicts_nothing(train: Train, store: SequenceStore) -> None:
    reports = train("ranking", tables=tables_with_dynamic(store, rows=ITEMS)).records
    tables = [record["tables"]["movies"] for record in reports if record["kind"] == "train"]
    assert tables[-1]["rows"] <= ITEMS and tables[-1]["capacity"] == ITEMS
    assert all(report["evictions"] == report["rejections"] == 0 for report in tables)
    assert tables[0]["hit_rate"] < tables[-1]["hit_rate"]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_run_that_goes_on_from_a_checkpoint_loses_no_row(train: Train, store: SequenceStore, policy: str) -> None:
    options = {
        "tables": tables_with_dynamic(store, rows=8, evict_strategy=policy, admission_threshold=3),
        "optimizer": {"optimizer_str": "adam"},
    }
    straight = train("ranking", trainer={"max_train_iters": 8}, **options)
    saving = {"max_train_iters": 4, "ckpt_save_interval": 4}
    train("ranking", output="resumed", trainer=saving, **options)
    resumed = train("ranking", output="resumed", trainer={"max_train_iters": 8, "ckpt_load_dir": "auto"}, **options)
    assert resumed.losses[-4:] == pytest.approx(straight.losses[-4:], rel=1e-6)
    assert straight.records[0]["tables"]["movies"]["waiting"] > 0


@pytest.fixture
def checkpoint(train: Train, store: SequenceStore) -> Path:
    finished = train(
        "ranking",
        tables=tables_with_dynamic(store, rows=8),
        trainer={"ckpt_save_interval": 4, "max_train_iters": 4, "train_batch_size": 1},
    )
    return next((finished.path.parent / "checkpoints").glob("iteration_*"))


def test_tables_go_to_parquet(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (content,) = read_table(checkpoint, "movies")
    whole, new = tmp_path / "whole.parquet", tmp_path / "new.parquet"
    begin = ["--ckpt", str(checkpoint), "--table", "movies", "--parquet"]
    assert main(["export", *begin, str(whole)]) == 0
    exported = pq.read_table(whole)
    assert exported["id"].to_pylist() == content.ids.tolist()
    assert np.array_equal(np.array(exported["row"].to_pylist(), np.float32), content.rows.numpy())

    assert main(["export", *begin, str(new), "--since-step", "3"]) == 0
    newest = content.changed > 3
    assert 0 < newest.sum() < len(newest)
    assert pq.read_table(new)["id"].to_pylist() == content.ids[newest].tolist()

    assert main(["export", "--ckpt", str(checkpoint), "--table", "films", "--parquet", str(new)]) == 3
    assert "has no dynamic table 'films'; it has movies" in capsys.readouterr().err


def test_inspecting_counts_the_ids(checkpoint: Path) -> None:
    (content,) = read_table(checkpoint, "movies")
    assert any(f"dynamic table movies   {len(content.ids)} ids × " in line for line in describe(checkpoint))


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
