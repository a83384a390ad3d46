"""The result of reading gin files: everything about a run, in frozen dataclasses. gin stops here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hstu.config.args import (
    Args,
    BenchmarkDatasetArgs,
    DatasetArgs,
    EmbeddingArgs,
    LRScheduleArgs,
    NetworkArgs,
    OptimizerArgs,
    PrecisionArgs,
    RankingArgs,
    RetrievalArgs,
    TensorModelParallelArgs,
    TrainerArgs,
)
from hstu.config.errors import ConfigError
from hstu.config.problems import Origin, literal

Task = Literal["ranking", "retrieval"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a user can set about a run. Equal when the values are, wherever they came from."""

    task: Task
    trainer: TrainerArgs
    dataset: DatasetArgs | BenchmarkDatasetArgs
    embeddings: tuple[EmbeddingArgs, ...] = ()
    """Tables given by hand, in file order; empty for a built-in dataset with its predefined tables only. With
    BenchmarkDatasetArgs always its ``embedding_args``."""
    network: NetworkArgs
    optimizer: OptimizerArgs
    schedule: LRScheduleArgs = field(default_factory=LRScheduleArgs)
    precision: PrecisionArgs = field(default_factory=PrecisionArgs)
    tensor_parallel: TensorModelParallelArgs = field(default_factory=TensorModelParallelArgs)
    task_args: RankingArgs | RetrievalArgs
    source_files: tuple[str, ...] = field(default=(), compare=False)
    """The gin files as given on the command line."""
    origins: Mapping[str, Mapping[str, Origin]] = field(default_factory=dict, compare=False, repr=False)
    """Where each parameter was bound: name of the part (see ``parts``) → parameter → file and line."""

    def __post_init__(self) -> None:
        expected = {"ranking": RankingArgs, "retrieval": RetrievalArgs}[self.task]
        if not isinstance(self.task_args, expected):
            raise ConfigError(f"task_args of a {self.task} run must be {expected.__name__}")
        if isinstance(self.dataset, BenchmarkDatasetArgs):
            tables = tuple(self.dataset.embedding_args)
            if self.embeddings not in ((), tables):
                raise ConfigError("with BenchmarkDatasetArgs the tables are its embedding_args; leave embeddings empty")
            object.__setattr__(self, "embeddings", tables)

    def parts(self) -> dict[str, Any]:
        """Every argument object by a name: "NetworkArgs", "embeddings[0]", "feature_args[1].seqlen_dist"."""
        single = (self.trainer, self.dataset, self.network, self.optimizer, self.schedule, self.precision)
        return named_parts([*single, self.tensor_parallel, self.task_args], self.embeddings)

    def operative_gin(self) -> str:
        """The configuration in force as gin text, defaults included; loading it gives an equal RunConfig."""
        writer = _GinWriter()
        writer.write(self.trainer)
        writer.write(self.dataset)
        if not isinstance(self.dataset, BenchmarkDatasetArgs):  # there they are written with the dataset
            for table in self.embeddings:
                writer.write(table, scope=writer.new_scope(table.table_name))
        rest = (self.network, self.optimizer, self.schedule, self.precision, self.tensor_parallel, self.task_args)
        for args in rest:
            writer.write(args)
        header = f"# The configuration in force, defaults included. Task: {self.task}."
        return "\n\n".join([header, *writer.blocks]) + "\n"


class Unknown(AttributeError):
    """A value that is not known because what the file says is wrong (and reported)."""


class Partial:
    """Stands in for an argument object some of whose values are wrong, so that the others can still be checked.

    Reading a wrong value raises Unknown.
    """

    def __init__(self, cls: type[Args], values: Mapping[str, Any]) -> None:
        self.kind = cls
        self.known = dict(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["known"][name]
        except KeyError:
            raise Unknown(name) from None


def kind_of(part: Args | Partial) -> type[Args]:
    """The argument class of a part, also of one that is partly wrong."""
    return part.kind if isinstance(part, Partial) else type(part)


def named_parts(single: Iterable[Any], tables: Sequence[Any]) -> dict[str, Any]:
    """See ``RunConfig.parts``: the classes that occur once, the tables, and what optimizers and data are made of."""
    parts = {kind_of(part).__name__: part for part in single}
    parts |= {f"embeddings[{index}]": table for index, table in enumerate(tables)}
    by_part = getattr(parts.get("OptimizerArgs"), "part_optimizers", ())
    parts |= {f"part_optimizers[{index}]": part for index, part in enumerate(by_part)}
    features = getattr(parts.get("BenchmarkDatasetArgs"), "feature_args", ())
    for index, group in enumerate(features):
        name = f"feature_args[{index}]"
        parts[name] = group
        parts |= {f"{name}.value_dists[{n}]": dist for n, dist in enumerate(getattr(group, "value_dists", None) or ())}
        if getattr(group, "seqlen_dist", None) is not None:
            parts[f"{name}.seqlen_dist"] = group.seqlen_dist
    return parts


class _GinWriter:
    """Writes argument objects as gin blocks; nested objects become scopes of their own, written first."""

    LINE_LENGTH = 110

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self._scopes: set[str] = set()

    def new_scope(self, name: str) -> str:
        """``name`` as an identifier that no other scope of the file has."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        base = base if re.match(r"[A-Za-z_]", base) else f"_{base}"
        scope, number = base, 2
        while scope in self._scopes:
            scope, number = f"{base}_{number}", number + 1
        self._scopes.add(scope)
        return scope

    def write(self, args: Args, scope: str = "") -> None:
        prefix = f"{scope}/" if scope else ""
        owner = f"{prefix}{type(args).__name__}"
        lines = [f"{owner}.{f.name} = {self._value(args, scope, f.name)}" for f in fields(args)]  # type: ignore[arg-type]
        self.blocks.append("\n".join(lines))

    def _value(self, args: Args, scope: str, name: str) -> str:
        value = getattr(args, name)
        if not isinstance(value, (list, tuple)):
            return self._element(value, scope or name)
        elements = [self._element(element, scope or name) for element in value]
        left, right = "[]" if isinstance(value, list) else "()"
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        line = f"{left}{', '.join(elements)}{comma}{right}"
        if len(line) <= self.LINE_LENGTH:
            return line
        return "\n".join([left, *(f"    {element}," for element in elements), right])

    def _element(self, value: Any, base: str) -> str:
        if not isinstance(value, Args):
            return literal(value)
        feature = (getattr(value, "feature_names", None) or [base])[0]
        scope = self.new_scope(getattr(value, "table_name", feature))
        self.write(value, scope)
        return f"@{scope}/{type(value).__name__}()"
