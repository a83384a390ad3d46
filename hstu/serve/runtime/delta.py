"""What an export holds: read from its folder or, for a delta, made of its base by the rules of delta.json.

docs/export.md describes the files of a delta.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .files import (
    CHANGES,
    DELTA,
    FACTS,
    MANIFEST,
    TABLES,
    VOCABULARY,
    WEIGHTS,
    checksum_of,
    fitting,
    read_directory,
    read_tensors,
    rows_at,
    run_indices,
)
from .requests import ServingError

Moves = Mapping[str, Tensor]
"""Kind of rows → int64 [runs, 2]: for all rows in order, (first row in the base, or -1 for new rows; their number)."""


@dataclass(frozen=True)
class Contents:
    """What an export holds. Tensors are never changed in place: contents share them."""

    facts: dict[str, Any]
    """serving.json."""
    tensors: dict[str, dict[str, Tensor]]
    """File → name → tensor, of weights, tables and vocabulary."""
    files: dict[str, Any]
    """File → size and sha256, as in the manifest of the whole export."""
    folders: tuple[Path, ...]
    """The folders of the delta, of its base, of the base of that, …."""

    @classmethod
    def read(cls, folder: Path, files: Mapping[str, Any] | None = None, mapped: bool = False) -> Self:
        """Read a whole export with these ``files``, which are verified; None: one that is being made."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = {
            name: read_tensors(folder / name, mapped and name != WEIGHTS) for name in (WEIGHTS, TABLES, VOCABULARY)
        }
        return cls(facts, tensors, dict(files or {}), (folder,))

    @property
    def digest(self) -> str:
        """Names the contents: the sha256 in the manifest of the whole export."""
        return checksum_of(self.files)

    def path_of(self, name: str) -> Path:
        """The newest file of this name."""
        return next((path for folder in self.folders if (path := folder / name).is_file()), self.folders[-1] / name)


def read_contents(
    directory: Path, known: Contents | None = None, mapped: bool = False, above: Sequence[Path] = ()
) -> Contents:
    """Read an export, or map its files. The base of a delta is ``known`` if it has the right digest, or is at its path.

    ``above``: the folders of deltas that are based on it. Raises ServingError if a file of it, or of an export that it
    is based on, is missing or damaged, or is another.
    """
    facts, files = read_directory(directory)
    if DELTA not in files:
        with fitting(directory):
            return Contents.read(directory, files, mapped)
    delta = json.loads((directory / DELTA).read_text(encoding="utf-8"))
    if known is None or known.digest != delta["base"]:
        known = _base_of(directory, delta, known, mapped, above)
    with fitting(directory):
        return _applied(known, directory, facts, delta)


def digest_of(folder: Path) -> str:
    """The digest of what an export holds, with its base if it is a delta. Files are not verified."""
    delta = folder / DELTA
    listed = json.loads((delta if delta.is_file() else folder / MANIFEST).read_text(encoding="utf-8"))
    return checksum_of(listed["files"])


def _base_of(
    directory: Path, delta: Mapping[str, Any], known: Contents | None, mapped: bool, above: Sequence[Path]
) -> Contents:
    folder, wanted = (directory / delta["path"]).resolve(), delta["base"]
    try:
        if folder not in (above := [*above, directory.resolve()]):
            base = read_contents(folder, known, mapped, above)
            if base.digest == wanted:
                return base
        problem = f"the export at {folder} has {digest_of(folder)[:12]}"
    except ServingError as error:
        problem = str(error)
    raise ServingError(
        f"{directory} leads from the export with the digest {wanted[:12]} to {checksum_of(delta['files'])[:12]}, but "
        f"{problem}. Put the export with {wanted[:12]} at {folder}, or make a whole export"
    )


def _applied(base: Contents, folder: Path, facts: dict[str, Any], delta: Mapping[str, Any]) -> Contents:
    """What a delta makes of its base, beside it. Tensors without changes are shared."""
    changes = read_tensors(folder / CHANGES)
    moves = {kind: changes[f"moves/{kind}"] for kind in delta["moves"]}
    tensors = {WEIGHTS: read_tensors(folder / WEIGHTS)}
    for file, rules in delta["tensors"].items():
        old, made = base.tensors[file], dict[str, Tensor]()
        for name, rule in rules.items():
            key = f"{file}/{name}"
            if rule is None:
                made[name] = old[name]
                continue
            rows = changes[f"{key}/values"] if rule["whole"] else moved(name, rule, old, made, moves)
            if rule["changed"] and not rule["whole"]:
                rows = rows.index_copy(0, rows_in(changes[f"{key}/rows"]), changes[f"{key}/values"])
            made[name] = _out_of_rows(name, rows)
        tensors[file] = made
    return Contents(facts, tensors, delta["files"], (folder, *base.folders))


def moved(
    name: str, rule: Mapping[str, Any], base: Mapping[str, Tensor], made: Mapping[str, Tensor], moves: Moves
) -> Tensor:
    """The rows of a tensor as they follow from the base.

    ``base``, ``made``: tensors of a file of the base and of the result, where bounds come before what they bound.
    """
    rows, runs = in_rows(name, base[name]), moves.get(rule.get("rows", ""))
    if "offsets" in rule:
        runs = _of_elements(runs, base[rule["offsets"]], made[rule["offsets"]])
    elif runs is None and len(rows) != rule["length"]:
        runs = _in_place(len(rows), rule["length"])
    if runs is not None:
        parts = [rows[at : at + n] if at >= 0 else rows.new_zeros(n, *rows.shape[1:]) for at, n in runs.tolist()]
        rows = torch.cat([rows[:0], *parts])
    if rule.get("values", "") in moves:
        span, places = rule["span"], new_rows(rows_in(moves[rule["values"]]))
        new = rows_at(places, (rows // span).clamp(max=len(places) - 1))
        rows = torch.where(rows < 0, rows, new * span + rows % span)
    return rows


def _in_place(old: int, new: int) -> Tensor:
    kept = min(old, new)
    return torch.tensor([[0, kept], [-1, new - kept]])


def _of_elements(runs: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """The runs of the elements of lists with bounds ``old`` and ``new``. Lists of another length count as new."""
    lists = rows_in(_in_place(len(old) - 1, len(new) - 1) if runs is None else runs)
    runs = runs_of(lists.masked_fill((lists < 0) | (rows_at(old.diff(), lists) != new.diff()), -1))
    ends = runs[:, 1].cumsum(0)
    first = rows_at(old, runs[:, 0]).masked_fill(runs[:, 0] < 0, -1)
    return torch.stack([first, new[ends] - new[ends - runs[:, 1]]], dim=1)


def new_rows(source: Tensor) -> Tensor:
    """New row of each row of the base, int64, -1 if it is gone. ``source``: base row of each new row, int64 [n]."""
    kept = (source >= 0).nonzero()[:, 0]
    found = source.new_full((int(source.max()) + 1 if len(kept) else 0,), -1)
    return found.index_copy(0, source[kept], kept)


def in_rows(name: str, tensor: Tensor) -> Tensor:
    """A tensor with one row per id: for the bounds of lists, their lengths."""
    return tensor.diff() if name.endswith(".offsets") else tensor


def _out_of_rows(name: str, rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows.cumsum(0), (1, 0)) if name.endswith(".offsets") else rows


def rows_in(runs: Tensor) -> Tensor:
    """The numbers, int64 [n], of runs, int64 [runs, 2]: (first, or -1 for as many -1; count)."""
    run, inside = run_indices(runs[:, 1])
    first = runs[run, 0]
    return torch.where(first < 0, first, first + inside)


def runs_of(numbers: Tensor) -> Tensor:
    """The inverse of ``rows_in``."""
    before = numbers[:-1]
    begins = numbers[1:] != torch.where(before < 0, before, before + 1)
    starts = torch.nn.functional.pad(begins.nonzero()[:, 0] + 1, (1, 0))[: len(numbers)]
    ends = torch.nn.functional.pad(starts[1:], (0, 1), value=len(numbers))[: len(starts)]
    return torch.stack([numbers[starts], ends - starts], dim=1)
