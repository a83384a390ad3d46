import threading
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingCollection, EmbeddingConfig

from hstu.base.errors import ConfigError
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs, NetworkArgs
from hstu.data.batches.batch import NEGATIVES
from hstu.data.features.roles import FeatureRoles
from hstu.model.embedding import ReplicatedTables, TableSpec, build_collections, initial_row_blocks, table_specs
from tests.helpers import make_batch

ROWS = 10_000


def spec(name: str = "item", rows: int = ROWS, dim: int = 6, replicated: bool = True) -> TableSpec:
    return TableSpec(name, rows, dim, (f"{name}_id",), replicated, "auto", init_std=0.1)


def initial_rows(table: TableSpec, start: int, stop: int, seed: int = 1) -> torch.Tensor:
    blocks = list(initial_row_blocks(table, seed, start, stop))
    assert all(len(rows) <= 4096 for _, rows in blocks), "memory must stay bounded"
    firsts = [first for first, _ in blocks]
    assert firsts == [start + sum(len(rows) for _, rows in blocks[:index]) for index in range(len(blocks))]
    return torch.cat([torch.empty(0, table.dim), *(rows for _, rows in blocks)])


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted))
def test_a_shard_starts_with_its_part_of_the_whole_table(bounds: list[int]) -> None:
    start, stop = bounds
    assert torch.equal(initial_rows(spec(), start, stop), initial_rows(spec(), 0, ROWS)[start:stop])


def test_as_many_blocks_are_drawn_at_a_time_as_pytorch_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, threads = torch.randn, 3
    together = threading.Barrier(threads, timeout=30)

    def meet(*args: Any, **kwargs: Any) -> torch.Tensor:
        together.wait()
        return draw(*args, **kwargs)

    expected = initial_rows(spec(rows=3 * 4096), 0, 3 * 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "randn", meet)
    assert torch.equal(initial_rows(spec(rows=3 * 4096), 0, 3 * 4096), expected)


def test_initial_rows_are_normal_and_differ_by_table_and_seed() -> None:
    rows = initial_rows(spec(), 0, ROWS)
    assert rows.std().item() == pytest.approx(0.1, rel=0.02)
    assert rows.mean().abs().item() < 0.002
    assert len(rows.unique()) > 0.99 * rows.numel()
    assert not torch.equal(rows, initial_rows(spec("user"), 0, ROWS))
    assert not torch.equal(rows, initial_rows(spec(), 0, ROWS, seed=2))


def test_replicated_tables_look_up_their_features() -> None:
    specs = [spec("my.item", rows=9), spec("other", rows=9, replicated=False)]
    tables = ReplicatedTables(specs, seed=1, item_feature="my.item_id")
    (rows,) = tables(make_batch([[3, 8], [], [3]], item="my.item_id")).values()
    assert torch.equal(rows, initial_rows(spec("my.item", rows=9), 0, 9)[[3, 8, 3]])
    assert tables.weight("my.item").requires_grad


def test_sharded_tables_are_grouped_by_width_and_hold_no_memory() -> None:
    collections = build_collections(
        [spec("a", 10**9, 6, False), spec("b", 10**9, 8, False), spec("c", 5, 12, False), spec("d", 5, 12, True)]
    )
    names = [[each.name for each in cast(EmbeddingCollection, one).embedding_configs()] for one in collections]
    assert names == [["a", "b"], ["c"]]  # 6 columns are stored as 8
    assert all(weight.is_meta for weight in collections.parameters())


def entry(table: str, *features: str) -> EmbeddingArgs:
    return EmbeddingArgs(
        feature_names=list(features), table_name=table, item_vocab_size_or_capacity=10, sharding_type="model_parallel"
    )


def network(**args: Any) -> NetworkArgs:
    return NetworkArgs(num_layers=1, hidden_size=32, num_attention_heads=1, kv_channels=4, **args)


ROLES = FeatureRoles("item", "act", ("user",), side=("genres", "year"))


def test_widths_follow_the_role_of_the_feature() -> None:
    specs = table_specs(
        [entry("u", "user"), entry("i", "item"), entry("a", "act"), entry("g", "genres"), entry("y", "year")],
        network(item_embedding_dim=16, contextual_embedding_dim=8), ROLES, lookup_negatives=True,
    )  # fmt: skip
    assert [(table.name, table.dim) for table in specs] == [("u", 8), ("i", 16), ("a", 16), ("g", 16), ("y", 16)]
    assert specs[1].features == ("item", NEGATIVES)
    assert [table.dim for table in table_specs([entry("i", "item")], network(), ROLES)] == [32]


@pytest.mark.parametrize("name", ["items", "training", "item.id"])
def test_a_name_that_pytorch_cannot_give_to_a_table_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        EmbeddingCollection(
            tables=[EmbeddingConfig(embedding_dim=4, name=name, num_embeddings=2, feature_names=["item"])]
        )
    with pytest.raises(ConfigError, match=rf"'{name}'.*'{name.replace('.', '_')}_table'"):
        table_specs([entry(name, "item")], network(), ROLES)


def test_a_table_shared_by_features_of_two_widths_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'shared'.*user 8, item 32"):
        table_specs([entry("shared", "user", "item")], network(contextual_embedding_dim=8), ROLES)


def test_a_dynamic_table_of_more_rows_than_a_rank_can_number_is_an_error() -> None:
    table = DynamicEmbeddingArgs(feature_names=["item"], table_name="items_of_all", item_vocab_size_or_capacity=2**33)
    assert table_specs([table], network(), ROLES, world_size=5)[0].rows > 2**33
    with pytest.raises(ConfigError, match=r"'items_of_all'.*2,147,483,648 rows per rank.*2,147,483,647 at most"):
        table_specs([table], network(), ROLES, world_size=4)
