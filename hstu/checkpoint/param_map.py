"""Names of a checkpoint that this run calls otherwise (TrainerArgs.ckpt_param_map)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hstu.config.errors import DataError

_WEIGHTS, _STATES = "model.", "optimizer."
_DENSE_STATES = "optimizer.dense."


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
            if len(words) != 2 or not all(word.startswith(_WEIGHTS) for word in words) or words[0] in entries:
                raise DataError(
                    f"{path}:{number}: {line.strip()!r}: expected two names of weights, the new and the old one, as "
                    "scripts/inspect_checkpoint.py shows them (model.…), and each new name once"
                )
            entries[words[0]] = words[1]
        return cls(entries)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the tensor that this run calls ``name``."""
        prefix, parameter, state = _parts(name)
        new = self._entry_of(parameter)
        if new is None:
            return name
        stored = self.entries[new] + parameter.removeprefix(new)
        return f"{prefix}{stored.removeprefix(_WEIGHTS)}{state}"

    def problems(self, names: Collection[str], stored: Collection[str]) -> list[str]:
        """Entries that fit no weight of this run or of the checkpoint."""
        problems = []
        for new, old in self.entries.items():
            if not any(_is_within(name, new) for name in names):
                problems.append(f"ckpt_param_map: {new} is no weight of this run")
            if not any(_is_within(name, old) for name in stored):
                problems.append(f"ckpt_param_map: {old} is not in the checkpoint")
        return problems

    def _entry_of(self, parameter: str) -> str | None:
        found = [new for new in self.entries if _is_within(parameter, new)]
        return max(found, key=len, default=None)


def _is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _parts(name: str) -> tuple[str, str, str]:
    """A tensor's name as what comes before ``model.<parameter>``'s own name, that name, and what comes after it."""
    if not name.startswith(_STATES):
        prefix, _, parameter = name.partition(".")
        return f"{prefix}.", f"{_WEIGHTS}{parameter}", ""
    prefix = _DENSE_STATES if name.startswith(_DENSE_STATES) else _STATES
    parameter, _, state = name.removeprefix(prefix).rpartition(".")
    return prefix, f"{_WEIGHTS}{parameter}", f".{state}"
