"""What an export (docs/export.md) holds: read from its folder or, for a delta, made of its base by delta.json."""

import hashlib
import json
import math
import mmap
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .requests import ServingError

FORMAT, VERSION = "hstu-serving", 4
MANIFEST, FACTS, TABLES, VOCABULARY = "manifest.json", "serving.json", "tables.safetensors", "vocabulary.safetensors"
PROGRAM, COMPILED, WEIGHTS = "program.pt2", "compiled.pt2", "weights.safetensors"
SERVING = "serving"
"""The folder in an export directory that services read."""
DELTA, CHANGES = "delta.json", "changes.safetensors"
Changes = Mapping[str, Tensor]
"""The tensors of changes.safetensors.

``moves/<kind of rows>``, int64 [runs, 2]: for all rows in order, (first row in the base, or -1 for new ones; number).
``<file>/<tensor>/values``: the rows at the runs ``<file>/<tensor>/rows``, or the whole tensor.
"""
MOST_CONTEXTS, MOST_ITEMS_OF_CONTEXT = 200, 1_000
"""Of the events of contexts: those of the values, and of the items of each, with the most events are counted."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip
_INT64, _DIGITS = range(-(2**63), 2**63), re.compile("-?[0-9]{1,19}")
_NUMBER = re.compile(r" *[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)? *")
_MOST_LISTED = 50  # values of a feature in its description


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify all files of an export. Returns (serving.json, file name → size and sha256). Raises ServingError."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if checksum_of(files) != manifest["sha256"]:
            raise ValueError("its content has changed")
        needed = {CHANGES} if DELTA in files else {PROGRAM, TABLES, VOCABULARY}
        if unlisted := {FACTS, WEIGHTS, *needed} - files.keys():
            raise ValueError(f"it has no {min(unlisted)}")
        for name, entry in files.items():
            path = directory / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{MANIFEST} lists it, but it lies outside the folder")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise ValueError(f"its sha256 is not the one in {MANIFEST}")
        path = directory / FACTS
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = f"{facts['format']} {facts['version']}"
    except FileNotFoundError:
        what = f"it has no {MANIFEST}, which is written last" if path.name == MANIFEST else f"{path} is missing"
        raise ServingError(
            f"{directory} is no complete export for serving: {what}. Copy the whole folder again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ServingError(f"{path} is damaged: {problem}. Copy the folder again") from None
    if found != f"{FORMAT} {VERSION}":
        raise ServingError(
            f"{directory} has the format {found}, and this program reads {FORMAT} {VERSION}. Use the package "
            "hstu_serving of the folder itself, or export the checkpoint again"
        )
    return facts, files


def checksum_of(files: Mapping[str, Any]) -> str:
    """The sha256 of the file list of a manifest: the digest of an export."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


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
    is based on, is missing or damaged, or is another."""
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
    changes, tensors = read_tensors(folder / CHANGES), {WEIGHTS: read_tensors(folder / WEIGHTS)}
    for file, rules in delta["tensors"].items():
        old, made = base.tensors[file], tensors.setdefault(file, {})
        for name, rule in rules.items():
            if rule is None:
                made[name] = old[name]
                continue
            runs, values = (changes.get(f"{file}/{name}/{part}") for part in ("rows", "values"))
            rows = moved(name, rule, old, made, changes) if rule else changes[f"{file}/{name}/values"]
            if runs is not None and values is not None:
                rows = rows.index_copy_(0, rows_in(runs), values)
            made[name] = torch.nn.functional.pad(rows.cumsum(0), (1, 0)) if name.endswith(".offsets") else rows
    return Contents(facts, tensors, delta["files"], (folder, *base.folders))


def moved(
    name: str, rule: Mapping[str, str], base: Mapping[str, Tensor], made: Mapping[str, Tensor], changes: Changes
) -> Tensor:
    """The rows of a tensor as they follow from the base, in memory of their own. ``base``, ``made``: tensors of a file
    of the base and of the result, where bounds come before what they bound."""
    rows, runs = in_rows(name, base[name]), changes[f"moves/{rule['rows']}"]
    if "offsets" in rule:
        runs = _of_elements(runs, base[rule["offsets"]], made[rule["offsets"]])
    parts = [rows[at : at + n] if at >= 0 else rows.new_zeros(n, *rows.shape[1:]) for at, n in runs.tolist()]
    rows = torch.cat([rows[:0], *parts])
    if "values" in rule:
        span, places = int(rule["span"]), new_rows(rows_in(changes[f"moves/{rule['values']}"]))
        new = rows_at(places, (rows // span).clamp(max=len(places) - 1))
        rows = torch.where(rows < 0, rows, new * span + rows % span)
    return rows


def _of_elements(runs: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The runs of the elements of lists with bounds ``old`` and ``new``. Lists of another length count as new."""
    lists = rows_in(runs)
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


def read_tensors(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    """Read a safetensors file: 8 bytes with the length of a JSON header, the header, the bytes of the tensors.

    Each tensor has memory of its own, so that one that stays in use, when a delta replaces others, keeps no others.
    ``mapped``: map them instead, so that processes share the memory. If the file is truncated later, they crash.
    """
    found = {}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8))
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None
        for name, entry in entries.items():
            if name != "__metadata__":
                shape, dtype, (first, end) = entry["shape"], _DTYPES[entry["dtype"]], entry["data_offsets"]
                file.seek(start + first)
                content = bytearray(end - first) if whole is None else memoryview(whole)[start + first : start + end]
                if len(content) < end - first or (whole is None and file.readinto(content) < len(content)):
                    raise ValueError(f"{path} ends early")
                tensor = torch.frombuffer(content, dtype=dtype, count=math.prod(shape)) if content else torch.empty(0)
                found[name] = tensor.to(dtype).view(shape)
    return found


@contextmanager
def fitting(directory: Path) -> Iterator[None]:
    """Turn any error in the block into a ServingError: files that are whole do not fit together."""
    try:
        yield
    except Exception as error:  # of any type
        found = f"{type(error).__name__}: {error}"
        raise ServingError(f"{directory}: its files do not fit together ({found}). Export it again") from error


def texts_of(stored: Mapping[str, Tensor], name: str) -> list[str]:
    """Decode the UTF-8 texts in ``<name>.utf8`` with the bounds ``<name>.offsets``."""
    content = bytes(stored[f"{name}.utf8"].tolist())
    return [content[a:b].decode() for a, b in pairwise(stored[f"{name}.offsets"].tolist())]


class Table:
    """An embedding table in float32, bfloat16, or int8 with one scale per row."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        self.weight, self.scale = weight, scale

    def rows(self, index: Tensor) -> Tensor:
        """Look up rows, float32 [n, dim]. A negative index, int64 [n], gives zeros."""
        found = rows_at(self.weight, index).float()
        if self.scale is not None:
            found = found * rows_at(self.scale, index)[:, None]
        return found.masked_fill_((index < 0)[:, None], 0)


def tables_of(stored: Mapping[str, Tensor]) -> dict[str, Table]:
    """The tables of a file. An int8 table has its scales in ``<name>.scale``."""
    return {name: Table(rows, stored.get(f"{name}.scale")) for name, rows in stored.items() if rows.ndim == 2}


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``. A negative index gives an arbitrary row."""
    if not len(values):
        return values.new_zeros((len(index), *values.shape[1:]))
    return values.index_select(0, index.clamp(min=0))


def int64s(values: Sequence[int]) -> Tensor:
    """int64 [n]. An array takes a third of the time of a list. Raises OverflowError."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if len(values) else torch.empty(0, dtype=torch.int64)


def run_indices(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(index of its run, index within the run) of each element of consecutive runs; both int64 [sum of lengths]."""
    run = torch.repeat_interleave(lengths)
    return run, torch.arange(len(run)) - (lengths.cumsum(0) - lengths)[run]


@dataclass(eq=False)
class Vocabulary:
    """Maps the values of one feature to their indices, and to table rows."""

    kind: str
    """ "texts" and "numbers" have ascending ``values``; a "range" has the numbers 0 … size - 1; codes of a "time"
    feature are computed from times; "raw" values are any int64, which the model reads unchanged."""
    size: int
    values: Any = None
    """The texts, a list, or the numbers, int64 [size]."""
    row_of: Tensor | None = None
    """Row of each value, int64 [size]. None: the index of the value."""
    missing: int = -1
    """Row for a missing value (None)."""
    unknown: int = -1
    """Row for an unknown value; -1 gives zeros."""
    ranges: Mapping[str, float] = field(default_factory=dict)
    """Those of the texts that are ranges of numbers → the first number of each, ascending. A number has the last range
    that does not begin after it, as in training; a smaller one has the first range."""

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, facts: Mapping[str, Any]) -> Self:
        """Create the vocabulary of an exported feature. ``facts``: entry of the feature in serving.json."""
        key, kind = f"ids.{name}", facts["kind"]
        values = texts_of(stored, key) if kind == "texts" else stored.get(key)
        size, rows = facts["size"] if values is None else len(values), stored.get(f"rows.{name}")
        return cls(kind, size, values, rows, facts["missing"], ranges=facts.get("ranges") or {})

    @cached_property
    def _places(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.values)}

    def _place(self, text: str) -> int:
        if self.ranges and text not in self._places and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
            text = [*self.ranges][max(0, bisect_right([*self.ranges.values()], float(text)) - 1)]
        return self._places.get(text, -1)

    def described(self, is_list: bool) -> dict[str, Any]:
        """The type of the values, their number, and the first of them: ranges, if they are ranges of numbers."""
        kind = "number" if self.ranges else "text" if self.kind == "texts" else "integer"
        count = 0 if self.kind == "raw" else min(self.size, _MOST_LISTED)
        values = [*self.ranges][:_MOST_LISTED] or self.values_at(torch.arange(count))
        return {"type": kind, "is_list": is_list, "count": len(self.ranges) or self.size, "values": values}

    def places(self, values: Sequence[Any]) -> Tensor:
        """Index of each value in the vocabulary, int64 [n]; -1 if unknown. Numbers may be given as texts."""
        if self.kind == "texts":
            return torch.tensor([self._place(str(value)) for value in values], dtype=torch.int64)
        wanted, is_other = _as_int64s(values)
        if self.kind in ("range", "time"):
            found = wanted.masked_fill((wanted < 0) | (wanted >= self.size), -1)
        elif self.kind == "raw":  # its values are not numbered
            found = torch.full_like(wanted, -1)
        else:
            found = torch.searchsorted(self.values, wanted).clamp_(max=self.size - 1)
            found = found.masked_fill_(rows_at(self.values, found) != wanted, -1)
        return found if is_other is None else found.masked_fill_(is_other, -1)

    def rows(self, values: Sequence[Any]) -> Tensor:
        """Row of each value, int64 [n]; ``missing`` for None."""
        if self.kind == "raw":
            found, is_other = _as_int64s(values)
            found = found if is_other is None else found.masked_fill_(is_other, self.unknown)
        else:
            found = self.rows_of(self.places(values))
        is_missing = [value is None for value in values]
        return found.masked_fill(torch.tensor(is_missing), self.missing) if any(is_missing) else found

    def rows_of(self, places: Tensor) -> Tensor:
        """Row of each index, int64 [n]; ``unknown`` for a negative index."""
        found = places if self.row_of is None else rows_at(self.row_of, places)
        return found.masked_fill(places < 0, self.unknown)

    def values_at(self, places: Tensor) -> list[Any]:
        """Values at the given indices, int64 [n]; for a "raw" feature the indices themselves."""
        if self.kind == "texts":
            return [self.values[place] for place in places.tolist()]
        found: list[Any] = (self.values.index_select(0, places) if self.kind == "numbers" else places).tolist()
        return found


def _as_int64s(values: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """(the numbers, int64 [n], 0 for what is none; whether each is none, bool [n], or None if all are numbers)."""
    if {*map(type, values)} == {int}:  # so are most requests; to look at each takes ten times as long
        with suppress(OverflowError):
            return int64s(values), None
    numbers = [_as_int64(value) for value in values]
    is_other = torch.tensor([number is None for number in numbers], dtype=torch.bool)
    return int64s([number or 0 for number in numbers]), is_other


def _as_int64(value: Any) -> int | None:
    if type(value) is not int:
        text = str(value)
        if not _DIGITS.fullmatch(text):  # int() also reads " 5_0 "
            return None
        value = int(text)
    return value if value in _INT64 else None
