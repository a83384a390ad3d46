"""Names of a checkpoint that this run calls otherwise (TrainerArgs.ckpt_param_map)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hstu.checkpoint.names import WEIGHTS, join, split
from hstu.config.errors import DataError


@dataclass(frozen=True)
class ParamMap:
    """Name in this run → name in the checkpoint, of a weight or of all that begin with it up to a dot.

    An optimizer's states go with their weights. The longest entry counts.
    """

    entries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> ParamMap:
        """From lines ``new old``; # begins a comment. Raises DataError that names the line."""
        entries: dict[str, str] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"TrainerArgs.ckpt_param_map: {path} cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not all(word.startswith(WEIGHTS) for word in words) or words[0] in entries:
                raise DataError(
                    f"{path}:{number}: {line.strip()!r}: expected two names of weights, the new and the old one, as "
                    "scripts/inspect_checkpoint.py shows them (model.…), and each new name once"
                )
            entries[words[0]] = words[1]
        return cls(entries)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the tensor that this run calls ``name``."""
        weight, state = split(name)
        new = max((new for new in self.entries if _is_within(weight, new)), key=len, default=None)
        return name if new is None else join(self.entries[new] + weight.removeprefix(new), state)

    def problems(self, names: Collection[str], stored: Collection[str]) -> list[str]:
        """Entries that fit no weight of this run or of the checkpoint."""
        problems = []
        for new, old in self.entries.items():
            if not any(_is_within(name, new) for name in names):
                problems.append(f"ckpt_param_map: {new} is no weight of this run")
            if not any(_is_within(name, old) for name in stored):
                problems.append(f"ckpt_param_map: {old} is not in the checkpoint")
        return problems


def _is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")
