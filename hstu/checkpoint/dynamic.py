"""Dynamic tables in a checkpoint: each rank writes what it holds, and reads of all files what it owns.

``dynamic_rank<r>.pt`` has, for each table, its ids, their scores, rows and optimizer states (TableContent), in no
order that means anything: a run of another number of ranks or another capacity puts them where they then belong.
``dynamic_times_rank<r>.json`` has when each table had seen how many batches. It lies apart, so that the other files of
equal runs are equal.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.checkpoint import safetensors_file
from hstu.checkpoint.dynamic_export import read_exported
from hstu.checkpoint.row_ids import MovedRows
from hstu.checkpoint.tensor_files import CONSOLIDATED
from hstu.checkpoint.torch_file import write_file
from hstu.config.errors import DataError
from hstu.parallel.dynamic.content import Sightings, TableContent
from hstu.parallel.dynamic.table import DynamicTable

log = logging.getLogger(__name__)

DYNAMIC_FILES = "dynamic_rank*.pt"
_TIMES = "times"

PlainTables = dict[str, dict[str, Any]]
"""Table → its TableContent as dicts, numbers and tensors."""


def copy_of_tables(tables: Mapping[str, DynamicTable]) -> PlainTables:
    """What this rank holds of them now, in host memory."""
    return {name: as_plain(table.content()) for name, table in tables.items()}


def write_dynamic_tables(root: Path, tables: PlainTables, rank: int) -> list[Path]:
    """Write this rank's share of the tables; the files, if there are any. Raises OSError where that fails."""
    if not tables:
        return []
    path = root / DYNAMIC_FILES.replace("*", str(rank))
    write_file({name: {key: plain[key] for key in plain if key != _TIMES} for name, plain in tables.items()}, path)
    times_file(path).write_text(json.dumps({name: plain[_TIMES] for name, plain in tables.items()}))
    return [path, times_file(path)]


def rank_of(path: Path) -> int:
    """The rank that wrote a file of DYNAMIC_FILES."""
    return int(path.stem.removeprefix(DYNAMIC_FILES.partition("*")[0]))


def times_file(path: Path) -> Path:
    """Where the times lie of the tables in ``path``, which need not exist."""
    return path.with_name(path.name.replace("dynamic_", "dynamic_times_")).with_suffix(".json")


@dataclass(frozen=True)
class Wanted:
    """A dynamic table of a run, and what a checkpoint has of it."""

    table: DynamicTable
    stored_name: str
    parts: Sequence[TableContent]
    """Empty: it is not there."""
    moved: MovedRows | None
    """If its ids have other codes now."""

    @property
    def cannot_be_told(self) -> bool:
        """Whether nothing says which id is which now."""
        return self.moved is not None and self.moved.places is None


def dynamic_problems(wanted: Sequence[Wanted], *, with_states: bool) -> list[str]:
    """What the tables need and the checkpoint has not, in the first of their parts; all are alike."""
    problems = []
    for of_run in wanted:
        name, table = of_run.stored_name, of_run.table
        if not of_run.parts:
            problems.append(f"dynamic table {name} is not in the checkpoint")
            continue
        stored = of_run.parts[0]
        if of_run.cannot_be_told:
            problems.append(f"dynamic table {name}: the vocabulary has changed, and which id is which cannot be told")
        if stored.rows.shape[1] != table.spec.dim:
            problems.append(f"dynamic table {name} is {stored.rows.shape[1]} wide there, {table.spec.dim} here")
        missing = [state for state in table.rows.no_states(0) if with_states and state not in stored.states]
        problems += [f"the state {state} of dynamic table {name} is not in the checkpoint" for state in missing]
    return problems


def read_dynamic_tables(wanted: Sequence[Wanted], rank: int, world_size: int, *, with_states: bool) -> None:
    """Overwrite this rank's share of the tables, but of none that ``dynamic_problems`` finds unfit.

    Without states, or where they lack, those begin anew.
    """
    for of_run in wanted:
        name, table, moved = of_run.stored_name, of_run.table, of_run.moved
        if not of_run.parts or of_run.cannot_be_told or of_run.parts[0].rows.shape[1] != table.spec.dim:
            continue
        parts = [_with_states_of(part, table, with_states) for part in of_run.parts]
        if moved is not None:
            stored = sum(len(part.ids) for part in parts)
            parts = [_recoded(part, moved) for part in parts]
            known = sum(len(part.ids) for part in parts)
            if rank == 0:
                log.warning("table %s: other ids than in the checkpoint; %d of its %d rows kept", name, known, stored)
        lost = table.restore(parts, rank, world_size)
        if lost:
            log.warning("table %s: rank %d has no room for %d of the checkpoint's ids; the best stay", name, rank, lost)


def read_tables(root: Path) -> dict[str, list[TableContent]]:
    """The parts of each dynamic table of a checkpoint or an export."""
    tables: dict[str, list[TableContent]] = {}
    for contents in _contents(root):
        for name, part in contents.items():
            tables.setdefault(name, []).append(part)
    return tables


def read_table(root: Path, name: str) -> list[TableContent]:
    """The parts of one table. Raises DataError where there is none of that name."""
    tables = read_tables(root)
    if name not in tables:
        raise DataError(f"{root} has no dynamic table {name!r}; it has {', '.join(sorted(tables)) or 'none'}")
    return tables[name]


def dynamic_sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Dynamic table → (ids, width) in a checkpoint or an export."""
    tables = read_tables(root)
    return {name: (sum(len(part.ids) for part in parts), parts[0].rows.shape[1]) for name, parts in tables.items()}


def _contents(root: Path) -> list[dict[str, TableContent]]:
    """What each rank has written, or an export has; tensors stay in the files until they are read."""
    if (root / CONSOLIDATED).is_file():
        return [read_exported(safetensors_file.open_file(root / CONSOLIDATED))]
    files = sorted(root.glob(DYNAMIC_FILES), key=rank_of)
    return [{name: _from_plain(plain) for name, plain in read_plain(file).items()} for file in files]


def read_plain(path: Path) -> PlainTables:
    """One rank's files, the tensors memory mapped."""
    tables: PlainTables = torch.load(path, mmap=True, weights_only=True)
    times = json.loads(times_file(path).read_text()) if times_file(path).is_file() else {}
    return {name: plain | {_TIMES: tuple(map(tuple, times.get(name, ())))} for name, plain in tables.items()}


def as_plain(content: TableContent) -> dict[str, Any]:
    """Copies, which a view must be to be saved without all that it is a view of."""
    fields = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
    fields["states"] = {name: _copy(state) for name, state in content.states.items()}
    if content.sightings is not None:
        fields["sightings"] = {"ids": _copy(content.sightings.ids), "scores": _copy(content.sightings.scores)}
    return {name: _copy(value) if isinstance(value, Tensor) else value for name, value in fields.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def _from_plain(plain: dict[str, Any]) -> TableContent:
    sightings = plain.pop("sightings")
    return TableContent(**plain, sightings=None if sightings is None else Sightings(**sightings))


def _recoded(part: TableContent, moved: MovedRows) -> TableContent:
    """The ids that still are in the vocabulary, under their new codes."""
    assert moved.places is not None, "dynamic_problems tells"
    codes = np.flatnonzero(moved.places >= 0)
    new_code = np.full(int(moved.places.max(initial=-1)) + 1, -1, dtype=np.int64)
    new_code[moved.places[codes]] = codes

    def recoded(ids: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < len(new_code))
        return torch.where(known, torch.from_numpy(new_code)[torch.where(known, ids, 0)], -1)

    ids = recoded(part.ids)
    kept = dataclasses.replace(part, ids=ids).chosen(ids >= 0)
    if part.sightings is None:
        return kept
    sighted = recoded(part.sightings.ids)
    return dataclasses.replace(kept, sightings=Sightings(sighted[sighted >= 0], part.sightings.scores[sighted >= 0]))


def _with_states_of(part: TableContent, table: DynamicTable, keep: bool) -> TableContent:
    """The states that the table has: those of the part, or zeros."""
    stored = part.states if keep else {}
    states = {name: stored.get(name, zeros) for name, zeros in table.rows.no_states(len(part.ids)).items()}
    return dataclasses.replace(part, states=states)
