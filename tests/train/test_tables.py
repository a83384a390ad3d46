"""Which tables a run has, and whether the ids fit.

Dynamic tables in whole runs: what is logged, what a checkpoint has, and what other tools get of it.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hstu.base.errors import ConfigError
from hstu.checkpoint.directory import describe_files, read_manifest, torch_load, torch_save, write_manifest
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.export import describe, export
from hstu.checkpoint.tensors import load_safetensors, read_metadata
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.train.tables import check_rows, choose_tables
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.train.tiny import ITEMS, FinishedRun, Train, build, run, tables_of, tables_with_dynamic, tiny_config, walks


def table(*features: str, name: str | None = None, rows: int = 10, **options: Any) -> EmbeddingArgs:
    return EmbeddingArgs(
        feature_names=list(features),
        table_name=name or features[0],
        item_vocab_size_or_capacity=rows,
        sharding_type="data_parallel",
        **options,
    )


def dynamic(feature: str, rows: int) -> DynamicEmbeddingArgs:
    return DynamicEmbeddingArgs(feature_names=[feature], table_name=feature, item_vocab_size_or_capacity=rows)


def test_tables_given_by_hand_take_the_place_of_predefined_ones() -> None:
    mine = table("item", name="mine", rows=99)
    predefined = [table("item"), table("action")]
    assert choose_tables([mine], predefined, ["item", "action"]) == (mine, predefined[1])


def test_a_shared_predefined_table_keeps_the_features_that_have_none_by_hand() -> None:
    chosen = choose_tables([table("item", name="mine")], [table("item", "last_item", "town")], ["item", "last_item"])
    assert {entry.table_name: entry.feature_names for entry in chosen} == {"mine": ["item"], "item": ["last_item"]}


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_tables([table("itme"), table("twon")], [], ["item", "town"])
    assert len(caught.value.problems) == 4


def test_a_table_by_hand_cannot_have_the_name_of_a_predefined_one_of_another_feature() -> None:
    with pytest.raises(ConfigError, match="two tables are called 'town': rename the one given by hand"):
        choose_tables([table("item", name="town")], [table("item"), table("town")], ["item", "town"])


def test_a_static_table_with_too_few_rows_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        check_rows([table("item", "last_item", rows=9), table("town", rows=2)], {"item": 10, "last_item": 9, "town": 5})
    first, second = caught.value.problems
    assert "EmbeddingArgs.item_vocab_size_or_capacity = 9: feature 'item' of table 'item' has 10 ids" in first
    assert "it must be at least 10, or the table a DynamicEmbeddingArgs" in first
    assert "table 'town'" in second


def test_a_dynamic_table_takes_more_ids_than_it_has_rows() -> None:
    check_rows([dynamic("item", 7), table("town", rows=5)], {"item": 10, "town": 5})


class OperatorsOn(TorchDispatchMode):
    """Records the operators that take a dense tensor of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.layout == torch.strided and tensor.numel() >= self.elements for tensor in tensors):
            self.names.add(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel_backend", ["cutlass", "pytorch"])
@pytest.mark.parametrize("sharded", [["item_id"], []], ids=["model_parallel", "data_parallel"])
def test_a_step_does_not_walk_through_a_table(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, sharded: list[str], kernel_backend: str
) -> None:
    rows = 20_000
    options: Any = {"trainer": {"max_grad_norm": 1.0}, "network": {"kernel_backend": kernel_backend}}
    options |= {"tables": with_items(store, sharded, rows), "task_args": {"negatives": "uniform", "num_negatives": 3}}
    trainer = build(tiny_config("retrieval", store, tmp_path, **options), mesh)
    batches = trainer.source.train_batches(SamplerPosition())
    trainer.pipeline.progress(batches)
    with OperatorsOn(rows * 16) as recorded:
        trainer.pipeline.progress(batches)
    by_row, views = {"aten.embedding", "aten.index_select", "aten.index_copy_"}, {"aten.detach", "aten.view"}
    assert "aten.embedding" in recorded.names
    assert recorded.names <= by_row | views


def with_items(store: SequenceStore, sharded: Sequence[str], rows: int) -> tuple[EmbeddingArgs, ...]:
    """The tables of the store, so many rows in that of the items."""
    return tuple(
        replace(table, item_vocab_size_or_capacity=rows) if table.feature_names == ["item_id"] else table
        for table in tables_of(store, sharded)
    )


def refusal(mesh: Mesh, store: str, output: str, sharded: tuple[str, ...], memory: int | None) -> str:
    """What a run says about ten billion items on a host with so many bytes of ``memory`` (None: its own)."""
    tables = with_items(SequenceStore.open(store), sharded, 10**10)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as told:
        if memory is not None:
            patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
        build(tiny_config("ranking", store, output, tables=tables), mesh)
    return str(told.value)


def test_tables_beyond_the_memory_are_refused_on_every_rank_before_it_is_taken(tmp_path: Path) -> None:
    store = write_small_store(tmp_path / "store", **walks())
    given: dict[str, Any] = {"store": str(store.path), "output": str(tmp_path)}
    cases = {
        "replicated": partial(refusal, **given, sharded=(), memory=None),
        "sharded": partial(refusal, **given, sharded=("item_id",), memory=None),
        "planned": partial(refusal, **given, sharded=("item_id",), memory=10**12),
    }
    first, second = run_cases(Launch(2, timeout_s=120), cases)
    assert first == second
    place, has = r"EmbeddingArgs.item_vocab_size_or_capacity = 10000000000: the ", r"which has [\d.]+ GB of"
    assert re.match(place + f"rows of the tables need 1,280.00 GB on this host, {has} memory;", first["replicated"])
    assert re.match(place + f"rows of the tables need 640.00 GB on this host, {has} memory;", first["sharded"])
    planned = r"model_parallel tables do not fit on 2 ranks: \w+ needs 1,920.00 GB"
    assert re.match(place + planned, first["planned"])


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


def test_tables_of_checkpoints_that_also_say_when_a_row_changed_are_read(checkpoint: Path, tmp_path: Path) -> None:
    earlier = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    file = earlier / "dynamic_rank0.pt"
    tables = torch_load(file)
    tables[TABLE]["changed"] = torch.zeros_like(tables[TABLE]["ids"])
    torch_save(tables, file)
    write_manifest(earlier, read_manifest(earlier) | describe_files(earlier, [file]))
    (found,), (expected,) = read_tables(earlier)[TABLE], read_tables(checkpoint)[TABLE]
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.rows, expected.rows)


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
