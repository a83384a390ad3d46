"""Rows behind a cache equal those of a table without one, whatever is evicted, initialised and prefetched.

FBGEMM's cache runs on GPUs only. These tests use a model of it that follows lru_cache_populate, lxu_cache_lookup and
lxu_cache_flush of fbgemm-gpu 1.8.0.
"""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hstu.base.hashing import splitmix64
from hstu.parallel.dynamic.hashing import initial_rows, mix, quantiles_of, table_key, unmix
from hstu.parallel.dynamic.rows import FbgemmCache, RowBlock, Rows

ROWS, DIM, SETS, WAYS, STEPS = 40, 4, 3, 2, 60
EMPTY = -1


class ModelCache:
    """A set-associative cache that evicts the oldest line of a set."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.lines = torch.zeros(SETS * WAYS, DIM)
        self.invalidate()

    def invalidate(self) -> None:
        """See FbgemmCache."""
        self.row_of, self.stamps, self.time = [EMPTY] * (SETS * WAYS), [0] * (SETS * WAYS), 1

    def lines_of(self, rows: Tensor) -> Tensor:
        """See FbgemmCache."""
        return torch.tensor([self.row_of.index(row) if row in self.row_of else -1 for row in rows.tolist()])

    def load(self, rows: Tensor) -> None:
        """See FbgemmCache."""
        wanted = sorted(set(rows[rows >= 0].tolist()))
        for row in wanted:
            if row in self.row_of:
                self.stamps[self.row_of.index(row)] = self.time
        for row in wanted:
            ways = range(row % SETS * WAYS, (row % SETS + 1) * WAYS)
            line = min(ways, key=self.stamps.__getitem__)
            if row not in self.row_of and self.stamps[line] != self.time:
                if self.row_of[line] != EMPTY:
                    self.host[self.row_of[line]] = self.lines[line]
                self.lines[line], self.row_of[line], self.stamps[line] = self.host[row], row, self.time

    def flush(self) -> None:
        """See FbgemmCache."""
        for line, row in enumerate(self.row_of):
            if row != EMPTY:
                self.host[row] = self.lines[line]

    def look_up(self, rows: Tensor) -> Tensor:
        """A lookup of FBGEMM: returns its lines, which backward will use."""
        self.time += 1
        self.load(rows)
        return self.lines_of(rows)


def trained_rows(*, prefetched_at_its_own_stamp: bool = False) -> int:
    """Train random batches behind the cache and without one; returns how many lookups differed."""
    generator = torch.Generator().manual_seed(0)
    plain = RowBlock(torch.zeros(ROWS, DIM), {"sum": torch.zeros(ROWS)})
    cache = ModelCache(torch.zeros(ROWS, DIM))
    part = RowBlock(cache.host, {"sum": torch.zeros(ROWS)}, cast(FbgemmCache, cache))
    tables, different, cached = [Rows([one], DIM) for one in (plain, part)], 0, 0
    batches = [torch.randint(ROWS, (9,), generator=generator) for _ in range(STEPS + 1)]
    for step in range(STEPS):
        initialized, source, target = torch.randperm(ROWS, generator=generator)[:12].split(4)
        initialized, source, target = initialized[: step % 4], source[: step % 3], target[: step % 3]
        first = torch.rand(len(initialized), DIM, generator=generator)
        for table in tables:
            table.initialize(initialized, first)
            before = [kept.clone() for kept in (table.read(ROWS)[0], table.blocks[0].states["sum"])]
            table.move(source, target)
            for kept, old in zip((table.read(ROWS)[0], table.blocks[0].states["sum"]), before, strict=True):
                assert torch.equal(kept[target], old[source])
        ids = batches[step].unique()
        lines = cache.look_up(ids)
        cached += int((lines >= 0).sum())
        found = torch.where((lines >= 0)[:, None], cache.lines[lines], cache.host[ids])
        different += int((found != plain.weight[ids]).any(dim=1).sum())
        cache.time += prefetched_at_its_own_stamp
        tables[1].prefetch(torch.where(batches[step + 1] % 5 == 0, -1, batches[step + 1]))
        for index, (row, line) in enumerate(zip(ids.tolist(), lines.tolist(), strict=True)):
            memory, number = (cache.lines, line) if line >= 0 else (cache.host, row)
            memory[number] += index + step
            plain.weight[row] += index + step
            for one in (plain, part):
                one.states["sum"][row] += 1
        if step % 20 == 19:  # write a checkpoint and read another one
            contents = [table.read(ROWS) for table in tables]
            different += int(
                (contents[0][0] != contents[1][0]).sum() + (contents[0][1]["sum"] != contents[1][1]["sum"]).sum()
            )
            tables[1].write(*contents[0])
    assert 0 < cached < STEPS * len(batches[0])
    return different


def test_what_is_looked_up_trained_and_saved_is_what_it_is_without_a_cache() -> None:
    assert trained_rows() == 0


def test_rows_prefetched_at_a_stamp_of_their_own_would_evict_what_backward_needs() -> None:
    assert trained_rows(prefetched_at_its_own_stamp=True) > 0


@pytest.mark.parametrize(("table", "expected"), [(1, [17, 30, 10]), (2, [27, 30, 20])])
def test_rows_are_numbered_as_the_kernel_numbers_those_of_all_its_cached_tables(table: int, expected: Any) -> None:
    kernel = SimpleNamespace(  # features of tables 0 (not cached), 1, 1 and 2
        cache_hash_size_cumsum=torch.tensor([-1, 10, 10, 20, 30]),
        feature_table_map=[0, 1, 1, 2],
        total_cache_hash_size=30,
    )
    assert FbgemmCache(cast(Any, kernel), table)._indices(torch.tensor([7, -1, 0])).tolist() == expected


def test_what_is_forgotten_is_written_back_first_as_tables_share_a_cache() -> None:
    done: list[str] = []
    kernel = SimpleNamespace(
        cache_hash_size_cumsum=torch.tensor([0, 10]),
        feature_table_map=[0],
        flush=lambda: done.append("flush"),
        reset_cache_states=lambda: done.append("reset"),
    )
    FbgemmCache(cast(Any, kernel), 0).invalidate()
    assert done == ["flush", "reset"]


def test_a_kernel_has_all_that_its_cache_is_loaded_with() -> None:
    """The operator runs on GPUs only, but it matches its arguments with its schema before it raises that."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(10, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        pooling_mode=PoolingMode.NONE,
        device=torch.device("cpu"),
    )
    del kernel.total_cache_hash_size  # a tensor without a cache, else a number
    kernel.total_cache_hash_size = 10
    cache = FbgemmCache(kernel, 0)
    with pytest.raises(NotImplementedError, match=r"'fbgemm::lru_cache_populate' with arguments from the 'CPU'"):
        cache.load(torch.tensor([3, -1]))
    assert cache.lines_of(torch.tensor([3, -1])).shape == (2,)


KEY = table_key(1234, "item")
NORMAL = quantiles_of("normal", torch.device("cpu"))


def test_an_id_has_the_same_row_whoever_is_beside_it_and_another_in_another_table_or_run() -> None:
    ids = torch.tensor([5, -(2**63), 2**63 - 1, 0, -1])
    rows = initial_rows(ids, 6, 0.1, KEY, NORMAL)
    assert torch.equal(initial_rows(ids[[3, 0]], 6, 0.1, KEY, NORMAL), rows[[3, 0]])
    assert len(rows.unique(dim=0)) == len(ids)
    for other in (table_key(1234, "user"), table_key(1235, "item")):
        assert not (initial_rows(ids, 6, 0.1, other, NORMAL) == rows).any()


def test_rows_are_normal_with_the_deviation_asked_for_and_do_not_resemble_one_another() -> None:
    rows = initial_rows(torch.arange(4000), 50, 0.02, KEY, NORMAL) / 0.02
    assert rows.dtype == torch.float32 and rows.shape == (4000, 50)
    assert abs(float(rows.mean())) < 0.01 and abs(float(rows.std()) - 1) < 0.01
    assert abs(float(rows.abs().median()) - 0.6745) < 0.01  # the normal distribution's
    assert float(torch.corrcoef(rows[:50]).fill_diagonal_(0).abs().max()) < 0.6
    assert float(torch.corrcoef(rows.t()).fill_diagonal_(0).abs().max()) < 0.1


def test_rows_may_be_uniform_with_the_same_deviation_or_zeros() -> None:
    ids, device = torch.arange(4000), torch.device("cpu")
    uniform, zeros = (initial_rows(ids, 6, 0.02, KEY, quantiles_of(kind, device)) for kind in ("uniform", "zeros"))
    assert abs(float(uniform.std()) / 0.02 - 1) < 0.01 and not zeros.any()
    assert float(uniform.abs().max()) == pytest.approx(0.02 * 3**0.5, rel=1e-3)
    assert abs(float(uniform.abs().median()) / 0.02 - 3**0.5 / 2) < 0.02


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_hashes_of_tensors_are_those_of_arrays_and_have_an_inverse(ids: list[int]) -> None:
    mixed = mix(torch.tensor(ids))
    assert np.array_equal(mixed.numpy().view(np.uint64), splitmix64(np.array(ids)))
    assert unmix(mixed).tolist() == ids
