"""Tables on a GPU never make the host wait for the device, but for one read of their figures when they are logged.

Without a GPU, launches of kernels are recorded instead of run. On the meta device whatever depends on a value raises.
"""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.model.embedding import TableSpec
from hstu.parallel.dynamic import table as tables
from hstu.parallel.dynamic.rows import FbgemmCache, RowBlock, Rows
from hstu.parallel.dynamic.slots import Counters, TorchSlots
from hstu.parallel.dynamic.table import DynamicTable, pop_reports

kernels = pytest.importorskip("hstu.ops.triton.slots", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
from hstu.ops.triton.launch import Launch, recorded_launches  # noqa: E402

CAPACITY, DIM = 40, 8
META = torch.device("meta")
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "__bool__", "__float__", "__int__", "__index__")


class MetaCache:
    """Stands in for FBGEMM's cache, whose operators have no meta kernels."""

    lines = torch.empty(6, DIM, device=META)

    def lines_of(self, rows: Tensor) -> Tensor:
        """See FbgemmCache."""
        return torch.empty_like(rows, dtype=torch.int32)

    def load(self, rows: Tensor) -> None:
        """See FbgemmCache."""


def make_table(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, threshold: int = 0, blocks: int = 1, cached: bool = False
) -> DynamicTable:
    args = DynamicEmbeddingArgs(
        feature_names=["item"],
        table_name="item",
        item_vocab_size_or_capacity=CAPACITY,
        evict_strategy="lfu",
        admission_threshold=threshold,
    )
    slots = lambda name, args, capacity, device: TorchSlots(capacity, "lfu", threshold, device, kernels)  # noqa: E731
    monkeypatch.setattr(tables, "create_slots", slots)
    spec = TableSpec("item", CAPACITY + 1, DIM, ("item",), False, "row_wise", 0.1, args)
    sizes = [CAPACITY + 1 - 10 * (blocks - 1), *[10] * (blocks - 1)]
    cache = cast(FbgemmCache, MetaCache()) if cached else None
    parts = [
        RowBlock(torch.zeros(size, DIM, device=device), {"sum": torch.zeros(size, device=device)}, cache)
        for size in sizes
    ]
    return DynamicTable(spec, 0, Rows(parts, DIM))


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    with recorded_launches((9, 0)) as recorded:
        yield recorded


def train(table: DynamicTable, batches: int = 4) -> None:
    for number in range(batches):
        ids = torch.arange(30, device=table.rows.device) * (number + 1)
        table.prefetch(ids)
        table.clear_default_row()
        table.assign_rows(ids)
        table.look_up(ids + 7)


@pytest.mark.parametrize("threshold", [0, 3])
@pytest.mark.parametrize(("blocks", "cached"), [(1, False), (2, False), (1, True)])
def test_batches_need_no_value_from_the_device(
    threshold: int, blocks: int, cached: bool, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(META, monkeypatch, threshold, blocks, cached)
    train(table)
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert {"find_slots", "clear", "insert_slots", "write_first_values"} <= names
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pop_reports({"item": table}, lambda numbers: numbers)


def test_figures_are_read_once_for_all_tables_when_they_are_logged(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: make_table(META, monkeypatch, 2) for name in ("item", "user")}
    reads: list[str] = []

    def noted(read: Any) -> Any:
        def call(owner: Tensor, *args: Any) -> Any:
            reads.append(read.__name__)
            return read(torch.zeros(owner.shape, dtype=owner.dtype), *args)

        return call

    for name in READS:
        monkeypatch.setattr(Tensor, name, noted(getattr(Tensor, name)))
    for table in some.values():
        train(table)
    assert not reads
    reports = pop_reports(some, lambda numbers: numbers)
    monkeypatch.undo()
    assert reads == ["tolist"] and reports["user"]["capacity"] == CAPACITY
    assert launches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU")
@pytest.mark.parametrize("threshold", [0, 3])
def test_no_batch_waits_for_a_gpu(threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(torch.device("cuda"), monkeypatch, threshold, blocks=2)
    train(table)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert Counters(*table.pop_figures()[1:].tolist()).evictions or threshold
