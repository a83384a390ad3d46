"""Dynamic tables in a checkpoint: each rank writes what it holds, and reads of all files what it owns.

``dynamic_rank<r>.pt`` has, for each table, its ids, their scores, rows and optimizer states (TableContent), in no
order that means anything: a run of another number of ranks or another capacity puts them where they then belong.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.config.errors import DataError
from hstu.parallel.dynamic.content import Sightings, TableContent
from hstu.parallel.dynamic.table import DynamicTable

log = logging.getLogger(__name__)

_FILES = "dynamic_rank*.pt"


def write_dynamic_tables(root: Path, tables: Mapping[str, DynamicTable], rank: int) -> list[Path]:
    """Write this rank's share of the tables; the file, if there is any."""
    if not tables:
        return []
    path = root / _FILES.replace("*", str(rank))
    torch.save({name: _as_plain(table.content()) for name, table in tables.items()}, path)
    return [path]


def dynamic_problems(root: Path, tables: Mapping[str, DynamicTable], with_states: bool) -> list[str]:
    """What the tables need and the checkpoint has not, in its first file; all are alike."""
    stored = next(iter(_contents(root)), {})
    problems = []
    for name, table in tables.items():
        if name not in stored:
            problems.append(f"dynamic table {name} is not in the checkpoint")
            continue
        if stored[name].rows.shape[1] != table.spec.dim:
            problems.append(f"dynamic table {name} is {stored[name].rows.shape[1]} wide there, {table.spec.dim} here")
        missing = [state for state in table.states if with_states and state not in stored[name].states]
        problems += [f"the state {state} of dynamic table {name} is not in the checkpoint" for state in missing]
    return problems


def read_dynamic_tables(
    root: Path, tables: Mapping[str, DynamicTable], rank: int, world_size: int, with_states: bool
) -> None:
    """Overwrite this rank's share of the tables, but of none that ``dynamic_problems`` finds missing or too wide.

    Without states, or where they lack, those begin anew.
    """
    for name, table in tables.items():
        parts = [contents[name] for contents in _contents(root) if name in contents]
        if not parts or parts[0].rows.shape[1] != table.spec.dim:
            continue
        lost = table.restore([_with_states_of(part, table, with_states) for part in parts], rank, world_size)
        if lost:
            log.warning("table %s: %d ids of the checkpoint have no room on rank %d; the best stay", name, lost, rank)


def read_table(root: Path, name: str) -> list[TableContent]:
    """The parts of one table of a checkpoint. Raises DataError where it has none of that name."""
    parts = [contents[name] for contents in _contents(root) if name in contents]
    if not parts:
        known = sorted({table for contents in _contents(root) for table in contents})
        raise DataError(f"{root} has no dynamic table {name!r}; it has {', '.join(known) or 'none'}")
    return parts


def _contents(root: Path) -> list[dict[str, TableContent]]:
    """What each rank has written; tensors stay in the files until they are read."""
    files = sorted(root.glob(_FILES), key=lambda path: int(path.stem.removeprefix("dynamic_rank")))
    loaded = [torch.load(file, mmap=True, weights_only=True) for file in files]
    return [{name: _from_plain(plain) for name, plain in tables.items()} for tables in loaded]


def _as_plain(content: TableContent) -> dict[str, Any]:
    """Dicts, numbers and tensors; copies, as a view would be saved with all that it is a view of."""
    fields = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
    fields["states"] = {name: state.clone() for name, state in content.states.items()}
    if content.sightings is not None:
        fields["sightings"] = {"ids": content.sightings.ids.clone(), "scores": content.sightings.scores.clone()}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in fields.items()}


def _from_plain(plain: dict[str, Any]) -> TableContent:
    sightings = plain.pop("sightings")
    return TableContent(**plain, sightings=None if sightings is None else Sightings(**sightings))


def _with_states_of(part: TableContent, table: DynamicTable, keep: bool) -> TableContent:
    """The states that the table has: those of the part, or zeros."""
    states = {}
    for name, state in table.states.items():
        if keep and name in part.states:
            states[name] = part.states[name]
        else:
            shape = (len(part.ids), table.spec.dim) if state.dim() > 1 else (len(part.ids),)
            states[name] = torch.zeros(shape, dtype=state.dtype)
    return dataclasses.replace(part, states=states)
