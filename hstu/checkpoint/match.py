"""Which tensor of a checkpoint goes into which of a run, and what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Size

from hstu.checkpoint.architecture import Difference
from hstu.checkpoint.names import AVERAGE, DYNAMIC, IDS, TABLES, split
from hstu.checkpoint.param_map import ParamMap
from hstu.checkpoint.row_ids import MovedRows
from hstu.config.trainer_args import TrainerArgs


@dataclass(frozen=True)
class LoadOptions:
    """How much of a checkpoint a run wants."""

    strict: bool = True
    """Anything that does not fit is an error."""
    optimizer: bool = True
    """False: the weights alone; the run starts at iteration 0 with fresh optimizers, schedule and data."""
    renamed: ParamMap = field(default_factory=ParamMap)

    @classmethod
    def of(cls, args: TrainerArgs) -> LoadOptions:
        """As the configuration says. Raises DataError for a bad ckpt_param_map."""
        renamed = ParamMap.read(args.ckpt_param_map) if args.ckpt_param_map else ParamMap()
        return cls(args.ckpt_load_strict, args.ckpt_load_optimizer, renamed)


@dataclass(frozen=True)
class Resized:
    """A tensor of another size in the checkpoint than in the run."""

    name: str
    stored: Size
    own: Size

    @property
    def common_rows(self) -> int:
        """Leading rows that both have: of tables of equal width. Nothing else has rows that mean the same."""
        if not split(self.name)[0].startswith(TABLES) or not self.stored or self.stored[1:] != self.own[1:]:
            return 0
        return min(self.stored[0], self.own[0])

    def __str__(self) -> str:
        return f"{self.name} is {tuple(self.stored)} in the checkpoint, {tuple(self.own)} in this run"


@dataclass(frozen=True)
class Match:
    """What to read, and what a report of the rest has to say."""

    stored_names: Mapping[str, str]
    """Tensor of the run → tensor of the checkpoint that is read into it, as a whole or some of its rows."""
    missing: tuple[str, ...] = ()
    """Tensors of the run that the checkpoint has not."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the checkpoint that the run has not."""
    resized: tuple[Resized, ...] = ()
    """Tensors of both, of different sizes."""
    moved: Mapping[str, MovedRows] = field(default_factory=dict)
    """Tables (as weights) whose rows are of other ids in the checkpoint → where to find them."""
    mistakes: tuple[str, ...] = ()
    """Of the rename map; always an error."""

    def problems(self) -> list[str]:
        """A line for each thing that does not fit."""
        return [
            *self.mistakes,
            *(f"{name} is not in the checkpoint" for name in self.missing),
            *map(str, self.resized),
            *(f"{name} has rows of other ids in the checkpoint than in this run's data" for name in self.moved),
            *(f"{name} is in the checkpoint only" for name in self.unexpected),
        ]

    def report(self, differences: list[Difference]) -> list[str]:
        """What a load that is not strict has done, a line each."""
        return [
            f"{len(self.stored_names)} tensors read",
            *(f"{name} is not in the checkpoint: as initialised" for name in self.missing),
            *(f"{entry}: {_outcome(entry)}" for entry in self.resized),
            *(f"{name} and its states: {rows}" for name, rows in self.moved.items()),
            *(f"{name} is in the checkpoint only: not read" for name in self.unexpected),
            *map(str, differences),
        ]


def _outcome(entry: Resized) -> str:
    if not entry.common_rows:
        return "as initialised"
    return f"the first {entry.common_rows} rows read" + ("" if entry.common_rows == entry.own[0] else ", others fresh")


def match(
    own: Mapping[str, Size],
    stored: Mapping[str, Size],
    options: LoadOptions,
    moved: Mapping[str, MovedRows] | None = None,
    dynamic: tuple[Collection[str], Collection[str]] = ((), ()),
) -> Match:
    """Find for each tensor of a run the one of the checkpoint; name → size of either. ``moved``: see Match.

    ``dynamic``: what the run and the checkpoint have besides, which may be renamed, too, but is read elsewhere.
    """
    moved = moved or {}
    own, stored = _wanted(own, options), _wanted(stored, options)
    names = {name: _stored_name(name, stored, options.renamed) for name in own}
    found = {name: theirs for name, theirs in names.items() if theirs in stored}
    pairs = [Resized(name, stored[theirs], own[name]) for name, theirs in found.items()]
    unread = {pair.name for pair in pairs if not _rows_to_read(pair, moved)}
    return Match(
        stored_names={name: theirs for name, theirs in found.items() if name not in unread},
        missing=tuple(_as(name, theirs) for name, theirs in names.items() if name not in found),
        unexpected=tuple(name for name in stored if name not in found.values() and _is_missed(name, options)),
        resized=tuple(
            pair
            for pair in pairs
            if pair.stored != pair.own and (pair.stored[1:] != pair.own[1:] or split(pair.name)[0] not in moved)
        ),
        moved={name: rows for name, rows in moved.items() if name in found},
        mistakes=tuple(options.renamed.problems([*own, *dynamic[0]], [*stored, *dynamic[1]])),
    )


def _rows_to_read(pair: Resized, moved: Mapping[str, MovedRows]) -> bool:
    rows = moved.get(split(pair.name)[0])
    if rows is None:
        return pair.stored == pair.own or pair.common_rows > 0
    return rows.places is not None and pair.stored[1:] == pair.own[1:]


def _wanted(tensors: Mapping[str, Size], options: LoadOptions) -> dict[str, Size]:
    """Without dynamic tables and what describes others; without the optimizer's where weights alone are to be read."""
    states = None if options.optimizer else ("", AVERAGE)
    return {
        name: size
        for name, size in tensors.items()
        if not name.startswith((IDS, DYNAMIC)) and (states is None or split(name)[1] in states)
    }


def _is_missed(name: str, options: LoadOptions) -> bool:
    """Averages come with the weights, but a run that keeps none does without."""
    return options.optimizer or split(name)[1] != AVERAGE


def _stored_name(name: str, stored: Collection[str], renamed: ParamMap) -> str:
    """The moving average of a weight of which none is stored begins at the weight."""
    theirs = renamed.stored_name(name)
    weight, state = split(theirs)
    return weight if state == AVERAGE and theirs not in stored else theirs


def _as(name: str, stored: str) -> str:
    return name if name == stored else f"{name} (there: {stored})"
