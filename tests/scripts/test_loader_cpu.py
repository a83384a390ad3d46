"""What the loader's benchmark relies on: a store of any size opens at once and takes no memory."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import REPOSITORY


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "bench")
    return import_module("loader_cpu")


def test_a_store_of_322_million_events_opens_in_a_tenth_of_a_second_in_any_memory(
    bench: ModuleType, tmp_path: Path
) -> None:
    store = bench.sparse_store(tmp_path / "large", 27_285, 322_278_385, 32_038_725)
    assert sum(file.stat().st_size for file in store.path.iterdir()) > 5e9
    found = [bench.opened(store.path) for _ in range(3)]
    assert min(each["open_s"] for each in found) < 0.1
    assert max(each["rss_bytes"] for each in found) < 16 << 20
    assert np.asarray(store.sequence("video_id")[200_000_000:200_000_003]).tolist() == [0, 0, 0]


def test_the_text_reader_reads_what_the_store_holds(bench: ModuleType, make_store, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = make_store([[3, 1, 2, 0], [0, 2, 2, 5, 6]], actions=[[1, 0, 0, 1], [4, 4, 2, 2, 2]])
    bench.write_rows(store, tmp_path / "rows.csv")
    rows = bench.RowDataset(tmp_path / "rows.csv", length=3)
    assert [rows[n]["item_id"].tolist() for n in range(2)] == [[3, 1, 0], [0, 2, 2]]
    assert [int(rows[n]["item_id_length"]) for n in range(2)] == [2, 3]
    assert rows[1]["action"].tolist() == [4, 4, 2]
