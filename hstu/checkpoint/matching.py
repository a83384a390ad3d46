"""Matches tensors of a checkpoint and of a run, which may differ in names, sizes, vocabularies and configuration."""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from torch import Size

from hstu.base.errors import DataError
from hstu.checkpoint.raw_ids import RowRemap
from hstu.checkpoint.tensors import AVERAGE, DYNAMIC, IDS, TABLES, WEIGHTS, is_weight, join_name, split_name
from hstu.config.args import CLASSES, Args, TrainerArgs
from hstu.config.gin_scan import scan_stored
from hstu.config.option import Changes, Mismatch, annotations_of, coerce, default_of, is_required
from hstu.config.problems import Binding

_BY_ID = "; where the data is newer, ckpt_load_strict = False finds rows by raw id, and new ids start anew"


@dataclass(frozen=True)
class ParamMap:
    """Renamed weights (TrainerArgs.ckpt_param_map): name in this run → name in the checkpoint.

    An entry is a weight, or a prefix up to a dot; the longest match counts. Optimizer states follow their weights.
    """

    entries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read lines ``new old``; # starts a comment. Raises DataError with the line number of a bad line."""
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
        """Return the checkpoint's name of the tensor that this run calls ``name``."""
        weight, state = split_name(name)
        new = max((new for new in self.entries if _is_within(weight, new)), key=len, default=None)
        return name if new is None else join_name(self.entries[new] + weight.removeprefix(new), state)

    def problems(self, names: Collection[str], stored: Collection[str]) -> list[str]:
        """Return one line for each entry that matches no weight of this run or of the checkpoint."""
        problems = []
        for new, old in self.entries.items():
            if not any(_is_within(name, new) for name in names):
                problems.append(f"ckpt_param_map: {new} is not a weight of this run")
            if not any(_is_within(name, old) for name in stored):
                problems.append(f"ckpt_param_map: {old} is not in the checkpoint")
        return problems


def _is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


@dataclass(frozen=True)
class LoadOptions:
    """How much of a checkpoint a run loads."""

    strict: bool = True
    """Whether every mismatch is an error."""
    optimizer: bool = True
    """False: load only weights, and start at iteration 0 with fresh optimizers, schedule and data."""
    param_map: ParamMap = field(default_factory=ParamMap)
    zero_new_rows: bool = False
    """Accept ids that the checkpoint lacks and zero their rows, to apply a model to newer data."""
    continues_on_other_data: bool = False
    """Whether the run may begin a new phase (TrainerArgs.continue_on)."""

    @property
    def accepts_new_rows(self) -> bool:
        """Whether tables may have more rows, or rows in another order, than in the checkpoint."""
        return self.zero_new_rows or (self.optimizer and self.continues_on_other_data)

    @classmethod
    def from_args(cls, args: TrainerArgs) -> Self:
        """Read the options from the configuration. Raises DataError for a bad ckpt_param_map."""
        param_map = ParamMap.read(args.ckpt_param_map) if args.ckpt_param_map else ParamMap()
        is_in_phases = args.continue_on is not None
        return cls(args.ckpt_load_strict, args.ckpt_load_optimizer, param_map, continues_on_other_data=is_in_phases)


class Resized(NamedTuple):
    """A tensor whose size differs between checkpoint and run."""

    name: str
    stored: Size
    own: Size

    @property
    def common_rows(self) -> int:
        """Number of leading rows to read: the rows that two tables of equal width share, 0 for other tensors."""
        if not split_name(self.name)[0].startswith(TABLES) or not self.stored or self.stored[1:] != self.own[1:]:
            return 0
        return min(self.stored[0], self.own[0])

    def __str__(self) -> str:
        return f"{self.name} is {tuple(self.stored)} in the checkpoint, {tuple(self.own)} in this run"


@dataclass(frozen=True)
class TensorMatch:
    """The tensors to read, and everything that does not fit."""

    remaps: Mapping[str, RowRemap]
    """Table weight → remap, for tables whose rows have other raw ids in the checkpoint."""
    stored_names: dict[str, str] = field(default_factory=dict)
    """Tensor of the run → tensor of the checkpoint, to be read whole or in part."""
    missing: list[str] = field(default_factory=list)
    """Tensors that only the run has."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that only the checkpoint has."""
    resized: list[Resized] = field(default_factory=list)

    def problems(self, accepts_new_rows: bool = False) -> list[str]:
        """Return one line per mismatch. ``accepts_new_rows``: see LoadOptions."""
        remaps = [name for name, remap in self.remaps.items() if not accepts_new_rows or remap.source_rows is None]
        return [
            *(f"{name} is not in the checkpoint" for name in self.missing),
            *(str(entry) for entry in self.resized if not (accepts_new_rows and entry.common_rows)),
            *(f"{name} has rows of other ids in the checkpoint{_BY_ID}" for name in remaps),
            *(f"{name} is in the checkpoint only" for name in self.unexpected),
        ]

    def report(self, differences: list["ConfigDifference"]) -> list[str]:
        """Return what a load that is not strict has done: one line per mismatch."""
        return [
            f"{len(self.stored_names)} tensors read",
            *(f"{name} is not in the checkpoint: as initialised" for name in self.missing),
            *(f"{each}: the first {each.common_rows} rows read" for each in self.resized if each.common_rows),
            *(f"{each}: as initialised" for each in self.resized if not each.common_rows),
            *(f"{name} and its states: {remap}" for name, remap in self.remaps.items()),
            *(f"{name} is in the checkpoint only: not read" for name in self.unexpected),
            *map(str, differences),
        ]


def match_tensors(
    own: Mapping[str, Size],
    stored: Mapping[str, Size],
    options: LoadOptions,
    remaps: Mapping[str, RowRemap] = MappingProxyType({}),
) -> TensorMatch:
    """Find the stored tensor for each tensor of a run, both given as name → size. ``remaps``: see TensorMatch."""
    param_map = options.param_map
    own, stored = _to_load(own, options), _to_load(stored, options)
    match = TensorMatch({name: each for name, each in remaps.items() if param_map.stored_name(name) in stored})
    found = set()
    for name, size in own.items():
        stored_name = param_map.stored_name(name)
        weight, state = split_name(stored_name)
        if state == AVERAGE and stored_name not in stored:
            stored_name = weight  # a missing moving average starts from its weight
        if stored_name not in stored:
            match.missing.append(name if name == stored_name else f"{name} (there: {stored_name})")
            continue
        found.add(stored_name)
        pair, remap = Resized(name, stored[stored_name], size), remaps.get(split_name(name)[0])
        is_as_wide = pair.stored[1:] == size[1:]
        if pair.stored != size and not (remap and is_as_wide):
            match.resized.append(pair)
        can_be_read = remap.source_rows is not None and is_as_wide if remap else pair.stored == size or pair.common_rows
        if can_be_read:
            match.stored_names[name] = stored_name
    left = (name for name in stored if name not in found)
    # A run without moving averages ignores stored ones.
    match.unexpected.extend(name for name in left if options.optimizer or split_name(name)[1] != AVERAGE)
    return match


def _to_load(tensors: Mapping[str, Size], options: LoadOptions) -> dict[str, Size]:
    """Return the weights with moving averages, and all states with ``options.optimizer``."""
    return {
        name: size
        for name, size in tensors.items()
        if not name.startswith((IDS, DYNAMIC)) and (options.optimizer or is_weight(name))
    }


class ConfigDifference(NamedTuple):
    """A gin parameter with different values in two configurations."""

    name: str
    stored: str
    own: str
    changes: Changes

    def __str__(self) -> str:
        return f"{self.name} = {self.stored} in the checkpoint, {self.own} in this run"


def config_differences(stored: str, own: str) -> list[ConfigDifference]:
    """Return the parameters that differ between two texts of operative.gin, in the order of the first text.

    A parameter missing in one text counts as its default, because an older program wrote it. Parameters that this
    program lacks are ignored.
    """
    left, right = (
        {binding.name: binding for binding in scan_stored(text, "operative.gin").bindings} for text in (stored, own)
    )
    differences = []
    for name in dict.fromkeys([*left, *right]):
        owner, _, parameter = name.rpartition("/")[2].partition(".")
        cls = CLASSES.get(owner)
        if cls is not None and (field := cls.__dataclass_fields__.get(parameter)):
            there, here = (_value(cls, field, side.get(name)) for side in (left, right))
            if there != here:
                differences.append(ConfigDifference(name, there, here, field.metadata["changes"]))
    return differences


def _value(cls: type[Args], field: Field[Any], binding: Binding | None) -> str:
    """Return a value as text, equal for two ways to write it, such as "a" and ("a",)."""
    if binding is None:
        return "nothing" if is_required(field) else repr(default_of(field))
    with contextlib.suppress(Mismatch):  # references to other objects stay unchanged
        return repr(coerce(annotations_of(cls)[field.name], binding.value))
    return repr(binding.value)
