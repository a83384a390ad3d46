"""The arrays of a sequence store, memory mapped, and whether they are what its description says."""

from __future__ import annotations

import hashlib
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from hstu.base.errors import DataError
from hstu.data.store.meta import MALFORMED, remedy

_OFFSET_SAMPLES = 1024


class StoreFiles:
    """File → its array, a read-only view of the memory map. Checks raise DataError, which names the damaged file."""

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        self._described: dict[str, dict[str, Any]] = meta["files"]
        self._command: str | None = meta["command"]
        self._maps: dict[str, np.ndarray] = {}

    def __contains__(self, file: str) -> bool:
        return file in self._described

    def __getitem__(self, file: str) -> np.ndarray:
        if file not in self._maps:
            self._maps[file] = np.asarray(open_memmap(self.path / file, mode="r"))
        return self._maps[file]

    @property
    def checksums(self) -> dict[str, str]:
        """File → the SHA-256 that its description states; its size in bytes in stores older than the checksums."""
        return {file: str(entry.get("sha256", entry["bytes"])) for file, entry in self._described.items()}

    def check_presence(self) -> None:
        """Checks that every file is there, with the size, dtype and length of its description."""
        for file, expected in self._described.items():
            path = self.path / file
            if not path.is_file():
                raise self.damaged(file, "it is missing")
            if path.stat().st_size != expected["bytes"]:
                raise self.damaged(file, f"it has {path.stat().st_size} bytes instead of {expected['bytes']}")
            try:
                array = self[file]
            except (*MALFORMED, OSError, EOFError, SyntaxError, tokenize.TokenError) as error:
                raise self.damaged(file, str(error)) from error
            if array.dtype.str != expected["dtype"] or array.shape != (expected["length"],):
                found = f"{array.dtype.str} {list(array.shape)}"
                raise self.damaged(file, f"it holds {found} instead of {expected['dtype']} [{expected['length']}]")

    def check_sums(self, up_to: int | None) -> None:
        """Checks the smallest files, ``up_to`` bytes in total; None means all. Older stores have no checksums."""
        left = up_to
        for file, expected in sorted(self._described.items(), key=lambda item: item[1]["bytes"]):
            if left is not None and (left := left - expected["bytes"]) < 0:
                return
            try:
                found = sha256(self.path / file)
            except OSError as error:
                raise self.damaged(file, str(error)) from error
            if found != expected.get("sha256", found):
                raise self.damaged(file, f"its SHA-256 is {found} instead of {expected['sha256']}")

    def check_ends(self, file: str, total: int) -> None:
        """Checks the ends and a sample of offsets."""
        offsets = self[file]
        if offsets[0] != 0 or offsets[-1] != total:
            raise self.damaged(file, f"it does not run from 0 to {total}")
        sample = offsets[np.linspace(0, len(offsets) - 1, min(_OFFSET_SAMPLES, len(offsets)), dtype=np.int64)]
        if (np.diff(sample) < 1).any():
            raise self.damaged(file, "its values are not ascending")

    def damaged(self, file: str, what: str) -> DataError:
        """The error that says what is wrong with a file, and how to make the store again."""
        return DataError(f"{self.path / file} is damaged: {what}. {self.remedy()}")

    def remedy(self) -> str:
        """How to make the store again, in words: the command that made it, with --force."""
        return remedy(self.path, {"command": self._command})


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
