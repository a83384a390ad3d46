"""Dynamic tables in an export: ``dynamic.<table>.ids`` int64 [n], ascending, and ``dynamic.<table>.weight`` [n, dim].

Beside the weights nothing of them is exported: who loads them begins with ids that were seen once, before any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor

from hstu.checkpoint.names import DYNAMIC
from hstu.parallel.dynamic.content import TableContent
from hstu.parallel.dynamic.slots import score

_IDS, _WEIGHT = ".ids", ".weight"


def exported_sizes(tables: Mapping[str, Sequence[TableContent]]) -> dict[str, tuple[Size, torch.dtype]]:
    """Name → size and type of the tensors that an export has of tables, given by the parts of each."""
    sizes: dict[str, tuple[Size, torch.dtype]] = {}
    for name, parts in tables.items():
        count, rows = sum(len(part.ids) for part in parts), parts[0].rows
        sizes[f"{DYNAMIC}{name}{_IDS}"] = Size([count]), torch.int64
        sizes[f"{DYNAMIC}{name}{_WEIGHT}"] = Size([count, rows.shape[1]]), rows.dtype
    return sizes


def fill_exported(tensors: Mapping[str, Tensor], tables: Mapping[str, Sequence[TableContent]]) -> None:
    """Write the tables into tensors of ``exported_sizes``, part by part."""
    for name, parts in tables.items():
        ids, order = torch.cat([part.ids for part in parts]).sort()
        tensors[f"{DYNAMIC}{name}{_IDS}"].copy_(ids)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        for part, own in zip(parts, places.split([len(part.ids) for part in parts]), strict=True):
            tensors[f"{DYNAMIC}{name}{_WEIGHT}"][own] = part.rows


def read_exported(tensors: Mapping[str, Tensor]) -> dict[str, TableContent]:
    """The tables among the tensors of an export, without states of an optimizer."""
    names = [name.removesuffix(_IDS) for name in tensors if name.startswith(DYNAMIC) and name.endswith(_IDS)]
    return {
        name.removeprefix(DYNAMIC): _content(tensors[f"{name}{_IDS}"], tensors[f"{name}{_WEIGHT}"]) for name in names
    }


def _content(ids: Tensor, rows: Tensor) -> TableContent:
    once, never = torch.ones_like(ids), torch.zeros_like(ids)
    return TableContent("lru", 0, ids, scores=score("lru", once, 0), changed=never, rows=rows, states={})
