"""Read the files of an exported directory: manifest, safetensors, tables and vocabularies."""

import hashlib
import json
import math
import mmap
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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


class Vocabulary:
    """Maps the values of one feature to their indices, and to table rows.

    Args:
        kind: "texts" and "numbers" have ascending ``values``; a "range" has the numbers 0 … size - 1; codes of a "time"
            feature are computed from times; "raw" values are any int64, which the model reads unchanged.
        size: number of values.
        values: the texts, or the numbers, int64 [size].
        rows: row of each value, int64 [size]. None: the index of the value.
        missing: row for a missing value (None).
        unknown: row for an unknown value; -1 gives zeros.
        ranges: those of the texts that are ranges of numbers → the first number of each, ascending. A number has the
            last range that does not begin after it, as in training; a smaller one has the first range.
    """

    def __init__(
        self,
        kind: str,
        size: int,
        values: list[str] | Tensor | None = None,
        rows: Tensor | None = None,
        missing: int = -1,
        unknown: int = -1,
        ranges: Mapping[str, float] | None = None,
    ) -> None:
        self.kind, self.size, self.missing, self.unknown = kind, size, missing, unknown
        self._rows = rows
        self.ranges = {name: float(first) for name, first in (ranges or {}).items()}
        self.texts = values if isinstance(values, list) else []
        self.numbers = values if isinstance(values, Tensor) else torch.empty(0, dtype=torch.int64)

    @classmethod
    def read(cls, stored: Mapping[str, Tensor], name: str, facts: Mapping[str, Any]) -> Self:
        """Create the vocabulary of an exported feature. ``facts``: entry of the feature in serving.json."""
        key, kind = f"ids.{name}", facts["kind"]
        values = texts_of(stored, key) if kind == "texts" else stored.get(key)
        size = facts["size"] if values is None else len(values)
        return cls(kind, size, values, stored.get(f"rows.{name}"), facts["missing"], ranges=facts.get("ranges"))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.texts)}

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
        else:
            found = torch.searchsorted(self.numbers, wanted).clamp_(max=len(self.numbers) - 1)
            found = found.masked_fill_(rows_at(self.numbers, found) != wanted, -1)
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
        found = places if self._rows is None else rows_at(self._rows, places)
        return found.masked_fill(places < 0, self.unknown)

    def values_at(self, places: Tensor) -> list[Any]:
        """Values at the given indices, int64 [n]; for a "raw" feature the indices themselves."""
        if self.kind == "texts":
            return [self.texts[place] for place in places.tolist()]
        found: list[Any] = (self.numbers.index_select(0, places) if self.kind == "numbers" else places).tolist()
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
