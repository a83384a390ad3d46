"""What ranks share in memory: arrays of one host in a file, and weights that lie in one buffer.

Threads stand for the ranks of two hosts; they share a store, and those of one host a file.
"""

import dataclasses
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

from hstu.base.errors import DataError
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
