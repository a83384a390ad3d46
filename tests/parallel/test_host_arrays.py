"""What ranks share in memory: arrays of one host in a file, and weights that lie in one buffer.

Threads stand for the ranks of two hosts; they share a store, and those of one host a file.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hstu.base.errors import DataError
from hstu.parallel.flat_weights import ALIGNMENT, FlatLayout, boxes
from hstu.parallel.host_arrays import once_per_host
from hstu.parallel.mesh import Mesh

RANKS, PER_HOST = 6, 3


@dataclasses.dataclass(frozen=True)
class Table:
    few: np.ndarray
    many: np.ndarray
    empty: np.ndarray
    name: str


TABLE = Table(np.arange(3, dtype=np.int32), np.arange(1001), np.empty(0, dtype=np.int64), "x")


def run_ranks(build: Callable[[], Table], store: Mock) -> list[Table]:
    ranks = [SimpleNamespace(rank=rank, local_world_size=PER_HOST, store=store) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        calls = [pool.submit(once_per_host, build, cast(Mesh, rank), "tables") for rank in ranks]
        return [call.result() for call in calls]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    return Mock(wraps=store)


def test_one_rank_per_host_builds_what_all_map(store: Mock, tmp_path: Path) -> None:
    build = Mock(return_value=TABLE)
    for call in (1, 2):
        found = run_ranks(build, store)
        assert build.call_count == call * RANKS // PER_HOST and not list(tmp_path.iterdir())
        for table in found:
            assert table.name == "x"
            for name in ("few", "many", "empty"):
                array, expected = getattr(table, name), getattr(TABLE, name)
                assert array.dtype == expected.dtype and (array == expected).all()
                assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned
    assert len(store.method_calls) == 2 * (3 * RANKS + RANKS // PER_HOST), "a constant number per rank"


@pytest.mark.parametrize("fails", ["NamedTemporaryFile", "memmap"])
def test_each_rank_builds_its_own_where_the_file_cannot_be_used(
    fails: str, store: Mock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile if fails == "NamedTemporaryFile" else np, fails, Mock(side_effect=OSError("no")))
    assert [table.name for table in run_ranks(lambda: TABLE, store)] == ["x"] * RANKS
    assert "keeps its own tables, because" in caplog.text


def test_an_error_of_the_data_is_every_ranks(store: Mock) -> None:
    build = Mock(side_effect=DataError("damaged"))
    with pytest.raises(DataError, match="damaged"):
        run_ranks(build, store)
    assert build.call_count == RANKS


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(1, 5))
def test_each_element_belongs_to_one_rank_and_no_rank_has_more_than_its_range(numels: list[int], ranks: int) -> None:
    layout = FlatLayout.of({str(index): numel for index, numel in enumerate(numels)}, ranks)
    owned = [layout.owned(rank) for rank in range(ranks)]
    for name, numel in layout.numels.items():
        assert [element for of_rank in owned for element in of_rank[name]] == list(range(numel))
        assert all(len(of_rank[name]) == 0 or of_rank[name].start % ALIGNMENT == 0 for of_rank in owned)
    assert all(sum(map(len, of_rank.values())) <= layout.range_size for of_rank in owned)
    assert layout.range_size % ALIGNMENT == 0
    assert ranks * layout.range_size <= sum(numels) + ALIGNMENT * (len(numels) + ranks)


@given(st.lists(st.integers(1, 6), max_size=3), st.data())
def test_boxes_hold_the_elements_in_their_order(size: list[int], data: st.DataObject) -> None:
    whole = np.arange(math.prod(size)).reshape(size)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    found = []
    for offset, shape in boxes(size, start, stop):
        box = whole[tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))]
        assert box.shape == shape
        found += box.ravel().tolist()
    assert found == list(range(start, stop))


def test_a_range_of_a_matrix_is_a_part_of_a_row_whole_rows_and_a_part_of_a_row() -> None:
    assert [*boxes((5, 4), 3, 18)] == [((0, 3), (1, 1)), ((1, 0), (3, 4)), ((4, 0), (1, 2))]
    assert [*boxes((5, 4), 9, 11)] == [((2, 1), (1, 2))]
