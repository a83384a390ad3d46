"""The journal of a long job: which of its stages are finished, and the result of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hstu.base.files import replace_text


class Journal:
    """The finished stages of a long job and the result of each, in a file that is replaced atomically at every commit.

    ``key`` identifies everything that the stages depend on. A journal with another key is ignored.
    """

    def __init__(self, file: Path, key: str | None) -> None:
        self.file = file
        self.key = key
        self.stages: dict[str, Any] = {}

    def resume(self) -> bool:
        """Takes over the stages of an interrupted job with the same key. False where there is none."""
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        is_ours = isinstance(stored, dict) and self.key is not None and stored.get("key") == self.key
        if not is_ours or not isinstance(stored.get("stages"), dict):
            return False
        self.stages = stored["stages"]
        return True

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def __getitem__(self, stage: str) -> Any:
        return self.stages[stage]

    def commit(self, stage: str, result: Any = None) -> None:
        """Records a stage as done. ``result`` must be JSON; files of the stage must already be on the disk."""
        self.stages[stage] = result
        replace_text(self.file, json.dumps({"key": self.key, "stages": self.stages}))
