"""A directory of Parquet files that is written part by part: a run that was killed goes on with the next part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hstu.base.errors import DataError
from hstu.base.files import written_aside

SETTINGS_FILE = "_settings.json"
"""Readers of Parquet directories leave out names that begin with an underscore."""


@dataclass(frozen=True)
class Parts:
    """The files part-00000.parquet, … of a directory. A file is complete once it has its name.

    settings: what the content depends on, by name; JSON. Parts of other settings are not continued.
    """

    directory: Path
    count: int
    settings: Mapping[str, Any]

    def open(self) -> list[int]:
        """Create the directory, or go on in it. Returns the numbers of the parts that are missing.

        Raises DataError if it is complete, was written with other settings, or holds something else.
        """
        file = self.directory / SETTINGS_FILE
        wanted = {"parts": self.count, **self.settings}
        if file.is_file():
            self._check(json.loads(file.read_text(encoding="utf-8")), wanted)
        elif self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise DataError(f"{self.directory} exists and holds no predictions; give another name, or remove it")
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._put(file, lambda aside: aside.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8"))
        missing = [number for number in range(self.count) if not self.path(number).is_file()]
        if not missing:
            raise DataError(f"{self.directory} exists and is complete; give another name, or remove it")
        return missing

    def _check(self, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        differing = [
            f"{name} was {stored.get(name)!r} and is {wanted.get(name)!r}"
            for name in {**stored, **wanted}
            if stored.get(name) != wanted.get(name)
        ]
        if differing:
            raise DataError(
                f"{self.directory} has parts of another call, which cannot be continued: {'; '.join(differing)}. Give "
                "the same arguments, or another name"
            )

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.directory / f"part-{number:05d}.parquet"

    def write(self, number: int, table: pa.Table) -> None:
        """Write a part: aside, synced, and then renamed, so that a kill or a crash leaves no half of one."""
        self._put(self.path(number), lambda aside: pq.write_table(table, aside))

    def _put(self, path: Path, write: Any) -> None:
        try:
            with written_aside(path) as aside:
                write(aside)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
