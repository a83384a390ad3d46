"""The stages that a long job has finished, so that it can go on after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Stage name -> what it left to know, in a file that is replaced whole at every commit.

    ``key`` stands for everything that the stages depend on: a journal with another key is not gone on with.
    """

    def __init__(self, file: Path, key: str, stages: dict[str, Any] | None = None) -> None:
        self.file = file
        self.key = key
        self.stages: dict[str, Any] = stages or {}

    @classmethod
    def resume(cls, file: Path, key: str) -> Journal | None:
        """The journal of an interrupted job with the same key; None where there is none."""
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(noted, dict) or noted.get("key") != key or not isinstance(noted.get("stages"), dict):
            return None
        return cls(file, key, noted["stages"])

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def __getitem__(self, stage: str) -> Any:
        return self.stages[stage]

    def commit(self, stage: str, left: Any = None) -> None:
        """Notes a stage as done; ``left`` must be JSON. What it wrote must be on the disk by now."""
        self.stages[stage] = left
        aside = self.file.with_suffix(".new")
        with aside.open("w", encoding="utf-8") as stream:
            json.dump({"key": self.key, "stages": self.stages}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, self.file)
