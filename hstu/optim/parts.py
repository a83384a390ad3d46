"""Which optimizer, learning rate and weight decay each dense weight has (OptimizerArgs.part_optimizers)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hstu.config.args import OptimizerArgs, PartOptimizerArgs
from hstu.config.errors import ConfigError
from hstu.config.problems import did_you_mean
from hstu.model.embedding import TableSpec

Cite = Callable[[PartOptimizerArgs, str, str], str]
"""(part, its parameter, what is wrong with it) → the whole line of an error."""


@dataclass(frozen=True)
class Settings:
    """How a weight is trained."""

    optimizer: str
    """One of OptimizerArgs.optimizer_str; rowwise_adagrad is adagrad here."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """As given; of some kinds of weights none decays (dense.decayed_parameters)."""
    max_gradient: float | None = None
    """To what gradients are clamped; of tables only."""

    @classmethod
    def of(cls, args: OptimizerArgs, part: PartOptimizerArgs | None = None) -> Settings:
        """Those of ``part``; what it leaves open is as OptimizerArgs says."""
        given = (part.optimizer_str, part.learning_rate, part.weight_decay) if part else (None, None, None)
        name, rate, decay = given
        return cls(
            args.optimizer_str if name is None else name,
            args.learning_rate if rate is None else rate,
            args.weight_decay if decay is None else decay,
        )


def settings_of_weights(
    names: Mapping[str, bool], args: OptimizerArgs, cite: Cite | None = None
) -> dict[str, Settings]:
    """How each weight is trained: by the first part whose regular expression is found in its name.

    ``names``: weight → whether it is of a kind that decays. Raises ConfigError, all in one, for parts that nothing
    comes of: that match no weight, only weights of parts before them, or, with a weight decay, none that decays.
    """
    cite = cite or _cite
    owners: dict[str, int] = {}
    problems = []
    for number, part in enumerate(args.part_optimizers):
        matching = [name for name in names if re.search(part.regex, name)]
        own = [name for name in matching if name not in owners]
        owners |= dict.fromkeys(own, number)
        if not matching:
            problems.append(cite(part, "regex", f"matches no dense weight{_known(part.regex, names)}"))
        elif not own:
            first = args.part_optimizers[owners[matching[0]]].regex
            text = f"all that it matches belongs to parts before it, the first to {first!r}: put this one earlier"
            problems.append(cite(part, "regex", text))
        elif part.weight_decay and not any(names[name] for name in own):
            text = f"none of what {part.regex!r} matches decays, {own[0]} for one: it is a norm or bias; remove it"
            problems.append(cite(part, "weight_decay", text))
    if problems:
        raise ConfigError(problems)
    others = Settings.of(args)
    by_part = [Settings.of(args, part) for part in args.part_optimizers]
    return {name: by_part[owners[name]] if name in owners else others for name in names}


def replicated_settings(spec: TableSpec, args: OptimizerArgs) -> Settings:
    """How a data_parallel table is trained: as EmbeddingArgs says, else OptimizerArgs; no part applies to it."""
    return Settings(
        spec.optimizer or args.optimizer_str,
        spec.learning_rate or args.learning_rate,
        args.weight_decay,
        args.sparse_max_gradient,
    )


def _known(regex: str, names: Iterable[str]) -> str:
    """The name that may have been meant, and all names, those of equal layers once."""
    words = dict.fromkeys(word for name in names for word in name.split("."))
    short = dict.fromkeys(re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in names)
    guess = did_you_mean(regex.rpartition(".")[2], words)
    return f"{guess}{' There' if guess else '; there'} are {', '.join(short)}"


def _cite(part: PartOptimizerArgs, parameter: str, text: str) -> str:
    return f"PartOptimizerArgs.{parameter} = {getattr(part, parameter)!r}: {text}"
