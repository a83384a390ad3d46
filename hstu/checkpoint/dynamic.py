"""Dynamic tables in checkpoints and exports.

In a checkpoint each rank writes its ids to ``dynamic_rank<r>.pt`` (table → TableContent), and reads the ids that it
owns from the files of all ranks. Their order has no meaning, so ranks and capacity may differ between save and load.

An export holds only ``dynamic.<table>.ids`` (int64 [n], ascending) and ``dynamic.<table>.weight`` ([n, dim]). Loading
treats each id as seen once, before the first batch.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from hstu.checkpoint.directory import listed_files, torch_load
from hstu.checkpoint.raw_ids import RowRemap
from hstu.checkpoint.tensors import CONSOLIDATED, DYNAMIC, is_export, load_safetensors
from hstu.parallel.dynamic.slots import score
from hstu.parallel.dynamic.table import DynamicTable, Sightings, TableContent
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

DYNAMIC_FILES = "dynamic_rank*.pt"
_IDS, _WEIGHT = ".ids", ".weight"

TableDicts = dict[str, dict[str, Any]]
"""Table → its TableContent as nested dicts of numbers and tensors."""


def to_host(value: Any) -> Any:
    """Copy the content of a table to host memory. torch.save would write a view with its whole storage."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True).contiguous()
    if dataclasses.is_dataclass(value):
        return {field.name: to_host(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {key: to_host(state) for key, state in value.items()} if isinstance(value, Mapping) else value


def read_tables(root: Path) -> dict[str, list[TableContent]]:
    """Return the dynamic tables of a checkpoint or an export, memory mapped, in parts as written."""
    if is_export(root):
        return _from_export(load_safetensors(root / CONSOLIDATED))
    tables: dict[str, list[TableContent]] = {}
    for file in sorted(listed_files(root, DYNAMIC_FILES), key=lambda path: int(path.stem.removeprefix("dynamic_rank"))):
        for name, fields in torch_load(file, mmap=True).items():
            sightings = fields.pop("sightings")
            fields.pop("changed", None)  # in checkpoints of earlier versions
            content = TableContent(**fields, sightings=None if sightings is None else Sightings(**sightings))
            tables.setdefault(name, []).append(content)
    return tables


def export_sizes(tables: Mapping[str, Sequence[TableContent]]) -> dict[str, tuple[Size, torch.dtype]]:
    """Return name → (size, dtype) of the tensors that hold the tables in an export. ``tables``: name → parts."""
    sizes: dict[str, tuple[Size, torch.dtype]] = {}
    for name, parts in tables.items():
        count, rows = sum(len(part.ids) for part in parts), parts[0].rows
        sizes[f"{DYNAMIC}{name}{_IDS}"] = Size([count]), torch.int64
        sizes[f"{DYNAMIC}{name}{_WEIGHT}"] = Size([count, rows.shape[1]]), rows.dtype
    return sizes


def fill_export(tensors: Mapping[str, Tensor], tables: Mapping[str, Sequence[TableContent]]) -> None:
    """Write the tables, part by part, into the tensors of ``export_sizes``."""
    for name, parts in tables.items():
        ids, order = torch.cat([part.ids for part in parts]).sort()
        tensors[f"{DYNAMIC}{name}{_IDS}"].copy_(ids)
        rows = order.argsort().split([len(part.ids) for part in parts])
        for part, own in zip(parts, rows, strict=True):
            tensors[f"{DYNAMIC}{name}{_WEIGHT}"][own] = part.rows


def _from_export(tensors: Mapping[str, Tensor]) -> dict[str, list[TableContent]]:
    tables = {}
    for name in tensors:
        if name.startswith(DYNAMIC) and name.endswith(_IDS):
            table, ids = name.removesuffix(_IDS), tensors[name]
            scores, rows = score("lru", torch.ones_like(ids), 0), tensors[f"{table}{_WEIGHT}"]
            content = TableContent("lru", 0, ids, scores=scores, rows=rows, states={})
            tables[table.removeprefix(DYNAMIC)] = [content]
    return tables


def table_problems(
    table: DynamicTable, name: str, parts: Sequence[TableContent], remap: RowRemap | None, *, with_states: bool
) -> list[str]:
    """Return one line for each thing that a table, ``name`` in the checkpoint, needs and ``parts`` of it there lack."""
    if not parts:
        return [f"dynamic table {name} is not in the checkpoint"]
    problems, states, width = [], parts[0].states, parts[0].rows.shape[1]  # states and width are equal in all parts
    if remap is not None and remap.source_rows is None:
        problems.append(f"dynamic table {name}: its ids stand for other raw ids than in this run's data")
    if width != table.spec.dim:
        problems.append(f"dynamic table {name} is {width} wide there, {table.spec.dim} here")
    missing = [state for state in table.rows.initial_states(0) if with_states and state not in states]
    return problems + [f"the state {state} of dynamic table {name} is not in the checkpoint" for state in missing]


def load_table(
    table: DynamicTable,
    name: str,
    parts: Sequence[TableContent],
    remap: RowRemap | None,
    mesh: Mesh,
    *,
    with_states: bool,
) -> None:
    """Overwrite this rank's part of a table if the rows fit. Missing or unwanted states begin anew."""
    if not parts or parts[0].rows.shape[1] != table.spec.dim:
        return
    parts = [_with_states_of(part, table, with_states) for part in parts]
    if remap is not None:
        if remap.source_rows is None:
            return
        stored = sum(len(part.ids) for part in parts)
        parts = [_recoded(part, remap.source_rows) for part in parts]
        kept = sum(len(part.ids) for part in parts)
        if mesh.is_main:
            log.warning("table %s: other ids than in the checkpoint; %d of its %d rows kept", name, kept, stored)
    lost = table.restore(parts, mesh.rank, mesh.world_size)
    if lost:
        log.warning("table %s: rank %d has no room for %d stored ids; the best stay", name, mesh.rank, lost)


def _with_states_of(part: TableContent, table: DynamicTable, keep: bool) -> TableContent:
    """Give a part the states of the table: stored ones, or initial ones."""
    stored = part.states if keep else {}
    states = {name: stored.get(name, initial) for name, initial in table.rows.initial_states(len(part.ids)).items()}
    return dataclasses.replace(part, states=states)


def _recoded(part: TableContent, source_rows: np.ndarray) -> TableContent:
    """Keep ids that are still in the vocabulary, with their new codes. ``source_rows``: see RowRemap."""
    codes = np.flatnonzero(source_rows >= 0)
    new_code = np.full(int(source_rows.max(initial=-1)) + 1, -1, dtype=np.int64)
    new_code[source_rows[codes]] = codes

    def recoded(ids: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < len(new_code))
        return torch.where(known, torch.from_numpy(new_code)[torch.where(known, ids, 0)], -1)

    ids = recoded(part.ids)
    kept = dataclasses.replace(part, ids=ids).select(ids >= 0)
    if part.sightings is None:
        return kept
    sighted = recoded(part.sightings.ids)
    return dataclasses.replace(kept, sightings=Sightings(sighted[sighted >= 0], part.sightings.scores[sighted >= 0]))
