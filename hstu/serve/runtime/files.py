"""Read the files of an exported directory: manifest, safetensors, tables and vocabularies."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .requests import ServingError

FORMAT, VERSION = "hstu-serving", 2
MANIFEST, FACTS, TABLES, VOCABULARY = "manifest.json", "serving.json", "tables.safetensors", "vocabulary.safetensors"
PROGRAM, COMPILED, WEIGHTS = "program.pt2", "program_aot.pt2", "weights.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64, "U8": torch.uint8}
_INT64 = range(-(2**63), 2**63)


def read_directory(directory: Path, verify: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a directory whose files are there and, verified, intact.

    Returns (what serving.json holds, name of each file → its sha256). Raises ServingError.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files, checksum = manifest["files"], manifest["sha256"]
        described = [(directory / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        raise ServingError(
            f"{directory} is no complete export for serving: it has no {MANIFEST}, which is written last. Copy the "
            "whole folder again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServingError(f"{directory / MANIFEST} is damaged ({error}). Copy the folder again") from None
    if checksum_of(files) != checksum:
        raise ServingError(f"{directory / MANIFEST} is damaged: its content has changed. Copy the folder again")
    for path, size, sha256 in described:
        if not path.is_file():
            raise ServingError(f"{path} is missing: the folder was copied in part. Copy all of it again")
        if path.stat().st_size != size:
            raise ServingError(f"{path} has {path.stat().st_size} bytes instead of {size}. Copy the folder again")
        if verify and _sha256(path) != sha256:
            raise ServingError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}. Copy the folder again")
    facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise ServingError(
            f"{directory} has the format {facts.get('format')} {facts.get('version')}, and this program reads {FORMAT} "
            f"{VERSION}. Use the package hstu_serving of the folder itself, or export the checkpoint again"
        )
    return facts, {path.name: sha256 for path, _, sha256 in described}


def checksum_of(files: Mapping[str, Any]) -> str:
    """The checksum of a manifest itself."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Safetensors:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, then the tensors' bytes.

    in_memory: read the file instead of mapping it. A mapped file that is cut off ends the process.
    """

    def __init__(self, path: Path, in_memory: bool = False) -> None:
        self._bytes: mmap.mmap | bytearray
        with path.open("rb") as file:
            if in_memory:
                self._bytes = bytearray(path.stat().st_size)
                file.readinto(self._bytes)
            else:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of read-only memory
        length = int.from_bytes(self._bytes[:8], "little")
        self._entries: dict[str, Any] = json.loads(self._bytes[8 : 8 + length])
        self._entries.pop("__metadata__", None)
        self._start = 8 + length

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._entries

    def names(self) -> Iterable[str]:
        """Names of the tensors."""
        return self._entries

    def tensor(self, name: str) -> Tensor:
        """A tensor, which shares the memory of the file."""
        entry = self._entries[name]
        shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        start = self._start + entry["data_offsets"][0]
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=start).view(shape)

    def texts(self, name: str) -> list[str]:
        """The texts whose bytes are ``<name>.utf8`` and whose bounds are ``<name>.offsets``."""
        start, stop = (self._start + offset for offset in self._entries[f"{name}.utf8"]["data_offsets"])
        content = self._bytes[start:stop]
        return [content[a:b].decode() for a, b in pairwise(self.tensor(f"{name}.offsets").tolist())]


class Table:
    """Rows of an embedding table in float32, bfloat16, or int8 with one factor per row."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        self.weight, self.scale = weight, scale

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.weight.shape[1]

    def rows(self, index: Tensor) -> Tensor:
        """float32 [n, dim]; zeros where ``index`` (int64 [n]) is negative."""
        found = rows_at(self.weight, index).float()
        if self.scale is not None:
            found = found * rows_at(self.scale, index)[:, None]
        return found.masked_fill((index < 0)[:, None], 0)


def read_tables(path: Path, in_memory: bool = False) -> dict[str, Table]:
    """The tables of a file. That of int8 has its factors under ``<name>.scale``."""
    stored = Safetensors(path, in_memory)
    return {
        name: Table(stored.tensor(name), stored.tensor(f"{name}.scale") if f"{name}.scale" in stored else None)
        for name in stored.names()
        if stored.tensor(name).ndim == 2
    }


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values[index], where a negative index gives any row."""
    if not len(values):
        return values.new_zeros((len(index), *values.shape[1:]))
    return values[index.clamp(min=0)]


class Vocabulary:
    """The values of one feature, and the row of a table that a model reads for each.

    Args:
        kind: "texts" and "numbers" are listed in ascending order; the numbers 0 … size - 1 of a "range" are not; the
            codes of a "time" feature follow from times; "raw" values are any int64, which the model gets as they are.
        size: number of values.
        values: the texts, or the numbers, int64 [size].
        rows: row of each value, int64 [size]. None: its place.
        missing: row that stands for a missing value.
        unknown: row that stands for a value that is not there; -1 gives zeros.
    """

    def __init__(
        self,
        kind: str,
        size: int,
        values: list[str] | Tensor | None = None,
        rows: Tensor | None = None,
        missing: int = -1,
        unknown: int = -1,
    ) -> None:
        self.kind, self.size, self.missing, self.unknown = kind, size, missing, unknown
        self._rows = rows
        self.texts = values if isinstance(values, list) else []
        self.numbers = values if isinstance(values, Tensor) else torch.empty(0, dtype=torch.int64)

    @classmethod
    def read(cls, stored: Safetensors, name: str, facts: Mapping[str, Any]) -> Vocabulary:
        """That of a feature in an exported directory. ``facts``: of this feature, in serving.json."""
        kind, values = facts["kind"], None
        if kind in ("texts", "numbers"):
            values = stored.texts(f"ids.{name}") if kind == "texts" else stored.tensor(f"ids.{name}")
        rows = stored.tensor(f"rows.{name}") if f"rows.{name}" in stored else None
        return cls(kind, int(facts["size"]), values, rows, int(facts["missing"]))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.texts)}

    def places(self, values: Sequence[Any]) -> Tensor:
        """Place of each value among all, int64 [n]; -1 for an unknown one. Numbers may be given as texts."""
        if self.kind == "texts":
            return torch.tensor([self._places.get(str(value), -1) for value in values], dtype=torch.int64)
        numbers = [_as_int64(value) for value in values]
        if self.kind in ("range", "time"):
            known = range(self.size)
            return torch.tensor([-1 if n is None or n not in known else n for n in numbers], dtype=torch.int64)
        wanted = torch.tensor([number or 0 for number in numbers], dtype=torch.int64)
        if not len(self.numbers):
            return torch.full_like(wanted, -1)
        found = torch.searchsorted(self.numbers, wanted).clamp(max=len(self.numbers) - 1)
        is_number = torch.tensor([number is not None for number in numbers], dtype=torch.bool)
        return torch.where(is_number & (self.numbers[found] == wanted), found, -1)

    def rows(self, values: Sequence[Any]) -> Tensor:
        """Row for each value, int64 [n]; ``missing`` for None."""
        if self.kind == "raw":
            numbers = [_as_int64(value) for value in values]
            found = torch.tensor([self.unknown if n is None else n for n in numbers], dtype=torch.int64)
        else:
            found = self.rows_of(self.places(values))
        return found.masked_fill(torch.tensor([value is None for value in values], dtype=torch.bool), self.missing)

    def rows_of(self, places: Tensor) -> Tensor:
        """Row for each place, int64 [n]; ``unknown`` where there is none."""
        found = places if self._rows is None else rows_at(self._rows, places)
        return found.masked_fill(places < 0, self.unknown)

    def values_at(self, places: Tensor) -> list[Any]:
        """The values at places, int64 [n]; of a "raw" feature the numbers themselves."""
        if self.kind == "texts":
            return [self.texts[place] for place in places.tolist()]
        found: list[Any] = (self.numbers[places] if self.kind == "numbers" else places).tolist()
        return found

    def value_at(self, place: int) -> Any:
        """The value at one place."""
        return self.values_at(torch.tensor([place]))[0]


def _as_int64(value: Any) -> int | None:
    try:
        number = value if type(value) is int else int(str(value))  # most are, and a history has many
    except ValueError:
        return None
    return number if number in _INT64 else None
