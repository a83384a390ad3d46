"""Dynamic tables for other tools: dumps of what has changed since a time or a step, and what comes back from a file."""

import argparse
import re
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu.checkpoint.describe import describe, diff
from hstu.checkpoint.directory import read_manifest, write_manifest
from hstu.checkpoint.dynamic import read_table
from hstu.checkpoint.export import export
from hstu.checkpoint.parquet import METADATA
from hstu.checkpoint.tensors import load_safetensors, read_metadata
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.throughput import PeakTflops
from hstu.parallel.dynamic.content import merged
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from scripts.dynamic_table import main, moment
from tests.train.tiny import FinishedRun, run, tables_with_dynamic, tiny_config

Train = Callable[..., FinishedRun]
ROWS, TABLE = 10, "movies"
TIMES = "hstu.parallel.dynamic.content"


@pytest.fixture(scope="module")
def finished(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of six batches, each noted in the log, with a checkpoint after every second one."""
    saving = {"ckpt_save_interval": 2, "max_train_iters": 6, "train_batch_size": 1}
    output, tables = tmp_path_factory.mktemp("dumps"), tables_with_dynamic(store, rows=ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{TIMES}.INTERVAL_S", 0.0)
        patch.setattr("hstu.train.builder.peak_tflops", lambda *_: PeakTflops(1.0, "assumed"))
        return run(tiny_config("ranking", store, output, tables=tables, trainer=saving), mesh)


@pytest.fixture(scope="module")
def checkpoints(finished: FinishedRun) -> Path:
    return finished.path.parent / "checkpoints"


def dumped(checkpoint: Path, path: Path, *since: str) -> pa.Table:
    assert main(["export", "--ckpt", str(checkpoint), "--table", TABLE, "--parquet", str(path), *since]) == 0
    return pq.read_table(path)


def imported(checkpoint: Path, output: Path, *files: Path) -> int:
    common = ["import", "--ckpt", str(checkpoint), "--table", TABLE, "--output", str(output)]
    return main([*common, "--parquet", *map(str, files)])


def test_a_time_stands_for_the_last_batch_before_it(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (content,) = read_table(checkpoints / "iteration_00000006", TABLE)
    assert [step for _, step in content.times] == list(range(7))
    numbers = set()
    for noted, step in content.times:
        found = dumped(checkpoints, tmp_path / "new.parquet", "--since-time", datetime.fromtimestamp(noted).isoformat())
        newest = max(other for at, other in content.times if at <= noted)  # two may fall on the same millisecond
        assert newest >= step and f"since batch {newest}, " in capsys.readouterr().out
        assert found["id"].to_pylist() == content.ids[content.changed > newest].tolist()
        numbers.add(len(found))
    assert len(numbers) > 2 and {0, len(content.ids)} <= numbers


def test_before_the_log_all_rows_have_changed_and_the_future_is_refused(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "deeper" / "new.parquet"
    assert len(dumped(checkpoints, new, "--since-time", "2001-09-09T01:46:40Z")) == ROWS
    assert "the log of movies starts later, so all rows are written" in capsys.readouterr().out
    later = ["--since-time", str(time.time() + 60)]
    assert main(["export", "--ckpt", str(checkpoints), "--table", TABLE, "--parquet", str(new), *later]) == 3
    assert "are in the future" in capsys.readouterr().err
    assert len(pq.read_table(new)) == ROWS, "as it was"


def test_a_checkpoint_from_before_there_were_logs_is_dumped_whole_and_gone_on_with(
    checkpoints: Path, tmp_path: Path, train: Train, store: SequenceStore
) -> None:
    old = tmp_path / "iteration_00000002"
    shutil.copytree(checkpoints / "iteration_00000002", old)
    (log,) = old.glob("dynamic_times_*")
    log.unlink()
    write_manifest(old, {name: entry for name, entry in read_manifest(old).items() if name != log.name})
    assert len(dumped(old, tmp_path / "new.parquet", "--since-time", str(time.time()))) == len(
        read_table(old, TABLE)[0].ids
    )
    trainer = {"ckpt_load_dir": str(old), "max_train_iters": 4, "train_batch_size": 1}
    resumed = train("ranking", tables=tables_with_dynamic(store, rows=ROWS), trainer=trainer)
    times = dynamic_tables(resumed.trainer.state.model)[TABLE].content().times
    assert [step for _, step in times] == [2, 4]


def test_times_are_local_unless_they_say_otherwise_and_numbers_are_seconds() -> None:
    local = datetime(2026, 3, 1, 8, 30).timestamp()
    assert moment("2026-03-01T08:30") == moment("2026-03-01 08:30:00") == local
    assert moment("2026-03-01T08:30Z") == moment("2026-03-01T09:30+01:00") == moment("1772353800") == 1772353800
    assert moment("1772353800.5") == 1772353800.5
    for text in ("yesterday", "", "2026-13-01", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
            moment(text)


def test_changes_after_a_whole_dump_make_the_later_table(
    checkpoints: Path, tmp_path: Path, train: Train, store: SequenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    early, late = (checkpoints / f"iteration_{step:08}" for step in (2, 6))
    whole, some, rest = (tmp_path / f"{name}.parquet" for name in ("whole", "some", "rest"))
    dumped(early, whole)
    assert "export later changes with --since-step 2" in capsys.readouterr().out
    dumped(checkpoints / "iteration_00000004", some, "--since-step", "2")
    dumped(late, rest, "--since-step", "4")
    assert imported(late, tmp_path / "edited", whole, some, rest) == 0
    trainer = {"max_train_iters": 9, "train_batch_size": 1}
    runs = [
        train("ranking", tables=tables_with_dynamic(store, rows=ROWS), trainer=trainer | {"ckpt_load_dir": str(path)})
        for path in (late, tmp_path / "edited")
    ]
    assert runs[0].losses == runs[1].losses
    for files, told in (
        ([rest], "has only what changed after batch 4: name the file of the whole table before it"),
        ([whole, rest], "the changes in between are missing"),
        ([whole, whole], "does not say that it has changes of a table"),
    ):
        assert imported(late, tmp_path / "refused", *files) == 3
        assert told in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_file_that_other_tools_have_written_is_imported(checkpoints: Path, tmp_path: Path) -> None:
    """They know nothing of fixed sizes and descriptions, and need not give what only training knows."""
    last, plain, few = checkpoints / "iteration_00000006", tmp_path / "plain.parquet", tmp_path / "few.parquet"
    whole = dumped(last, tmp_path / "whole.parquet")
    assert whole["raw_id"].to_pylist() == [1000 + code for code in whole["id"].to_pylist()]
    pq.write_table(pa.Table.from_pylist(whole.drop(["id"]).to_pylist()), plain)
    assert pa.types.is_list(pq.read_table(plain)["row"].type)
    assert imported(last, tmp_path / "plain", plain) == 0
    assert list(diff(last, tmp_path / "plain" / last.name)) == []

    pq.write_table(whole.select(["raw_id", "row"]), few)
    assert imported(last, tmp_path / "few", few) == 0
    (content,), (old,) = read_table(tmp_path / "few" / last.name, TABLE), read_table(last, TABLE)
    assert torch.equal(content.ids, old.ids) and torch.equal(content.rows, old.rows)
    assert content.states.keys() == old.states.keys() and not any(state.any() for state in content.states.values())


def replaced(table: pa.Table, name: str, values: Sequence[object]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (lambda table: table.drop(["row"]), r"has no column 'row'; it has id, raw_id, count"),
        (lambda table: replaced(table, "row", [[1.0]] * ROWS), r"column 'row' must have a list of 16 numbers"),
        (lambda table: replaced(table, "row", [[np.nan] * 16] * ROWS), r"column 'row' has numbers that are not finite"),
        (lambda table: replaced(table, "row", ["a"] * ROWS), r"column 'row' must have a list of 16 numbers"),
        (lambda table: replaced(table, "count", [None, *range(1, ROWS)]), r"column 'count' must have a number in"),
        (lambda table: replaced(table, "step", range(-1, ROWS - 1)), r"column 'step' has numbers below 0"),
        (lambda table: replaced(table, "step", [2**32] * ROWS), r"column 'step' has numbers above 4294967295"),
        (
            lambda table: table.replace_schema_metadata({METADATA: b'{"table": "users"}'}),
            r"is of the table 'users', not of 'movies'",
        ),
        (lambda table: replaced(table, "raw_id", [1000] * ROWS), r"has ids more than once"),
        (lambda table: replaced(table, "raw_id", range(ROWS)), rf"{ROWS} raw id\(s\) are not in the checkpoint: 0, 1"),
        (lambda table: replaced(table, "raw_id", ["a"] * ROWS), r"ids are whole numbers, those .* are string"),
    ],
)
def test_files_that_make_no_table_are_refused(
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoilt: Callable[[pa.Table], pa.Table],
    told: str,
) -> None:
    path = tmp_path / "spoilt.parquet"
    pq.write_table(spoilt(dumped(checkpoints, path)), path)
    assert imported(checkpoints, tmp_path / "edited", path) == 3
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "edited").exists()


def test_files_that_cannot_be_read_or_written_are_told(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, whole = tmp_path / "text", tmp_path / "whole.parquet"
    text.write_text("id,row\n")
    for path, why in ((text, ""), (tmp_path / "absent", "there is no such file")):
        assert imported(checkpoints, tmp_path / "edited", path) == 3
        assert f"{path} cannot be read as a Parquet file: {why}" in capsys.readouterr().err
    below = ["export", "--ckpt", str(checkpoints), "--table", TABLE, "--parquet", str(text / "below")]
    assert main(below) == 3
    assert "below cannot be written: " in capsys.readouterr().err
    dumped(checkpoints, whole)
    assert imported(checkpoints, tmp_path / "edited", whole) == 0
    assert imported(checkpoints, tmp_path / "edited", whole) == 3
    assert "exists; give another directory" in capsys.readouterr().err


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


def test_a_diff_tells_the_ids_and_rows_that_differ(checkpoints: Path) -> None:
    left, right = (checkpoints / f"iteration_{step:08}" for step in (2, 6))
    assert list(diff(left, left)) == []
    lines = list(diff(left, right))
    first, second = (merged(read_table(path, TABLE)) for path in (left, right))
    lost, come = (len({*one.ids.tolist()} - {*other.ids.tolist()}) for one, other in ((first, second), (second, first)))
    assert come and f"dynamic.movies: {lost} ids only in the first, {come} only in the second" in lines
    assert any(re.match(r"dynamic\.movies\.weight: [\d,]+ of [\d,]+ differ, by up to", line) for line in lines)
