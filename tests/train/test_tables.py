"""Which tables a run has, and whether the ids fit."""

import re
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
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.tables import check_rows, choose_tables
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.train.tiny import build, tables_of, tiny_config, walks


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
