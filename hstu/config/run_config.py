"""RunConfig, the result of reading gin files: all options of a run in frozen dataclasses."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hstu.base.errors import ConfigError
from hstu.config.args import (
    CLASSES,
    REGISTRY,
    SCOPED,
    TASK_ARGS,
    Args,
    BenchmarkDatasetArgs,
    ContextParallelArgs,
    DataParallelArgs,
    DatasetArgs,
    EmbeddingArgs,
    LRScheduleArgs,
    NetworkArgs,
    NumericFeatureArgs,
    OptimizerArgs,
    PrecisionArgs,
    RankingArgs,
    RetrievalArgs,
    Task,
    TensorModelParallelArgs,
    TrainerArgs,
)
from hstu.config.gin_scan import Reference
from hstu.config.option import Need, args_in, default_of, options_of, with_origins
from hstu.config.problems import literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All options of a run. Equality compares values, not where files bind them."""

    task: Task
    trainer: TrainerArgs
    dataset: DatasetArgs | BenchmarkDatasetArgs
    embeddings: tuple[EmbeddingArgs, ...] = ()
    """Tables that the gin files bind, in file order; with BenchmarkDatasetArgs its ``embedding_args``."""
    numbers: tuple[NumericFeatureArgs, ...] = ()
    """How numeric features are read, in file order. Features that are not listed are standardized."""
    network: NetworkArgs
    """``disable_contextual_mask`` has its effective value, never None."""
    optimizer: OptimizerArgs
    schedule: LRScheduleArgs = field(default_factory=LRScheduleArgs)
    table_schedule: LRScheduleArgs | None = None
    """The schedule of the tables; None: ``schedule``."""
    precision: PrecisionArgs = field(default_factory=PrecisionArgs)
    tensor_parallel: TensorModelParallelArgs = field(default_factory=TensorModelParallelArgs)
    data_parallel: DataParallelArgs = field(default_factory=DataParallelArgs)
    context_parallel: ContextParallelArgs = field(default_factory=ContextParallelArgs)
    task_args: RankingArgs | RetrievalArgs
    source_files: tuple[str, ...] = field(default=(), compare=False)
    """The gin files as given on the command line."""

    def __post_init__(self) -> None:
        """Replaces options without effect by their defaults. Raises ConfigError if task or tables are inconsistent."""
        expected = TASK_ARGS[self.task]
        if not isinstance(self.task_args, expected):
            raise ConfigError(f"task_args of a {self.task} run must be {expected.__name__}")
        for each in fields(self):
            object.__setattr__(self, each.name, self._in_force(getattr(self, each.name)))
        if isinstance(self.dataset, BenchmarkDatasetArgs):
            tables = tuple(self.dataset.embedding_args)
            if self.embeddings not in ((), tables):
                raise ConfigError("with BenchmarkDatasetArgs the tables are its embedding_args; leave embeddings empty")
            object.__setattr__(self, "embeddings", tables)
        if self.network.disable_contextual_mask is None:
            without_leak = replace(self.network, disable_contextual_mask=not self.dataset.has_candidates)
            object.__setattr__(self, "network", with_origins(without_leak, self.network.origins))

    def _in_force(self, value: Any) -> Any:
        """``value`` with options without effect replaced by their defaults, recursively."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._in_force, value))
        if isinstance(value, dict):
            return {key: self._in_force(element) for key, element in value.items()}
        if not isinstance(value, Args):
            return value
        for each in options_of(type(value)):
            own = getattr(value, each.name)
            needs = (need for need in each.metadata["needs"] if not self.must_meet(need))
            has_effect = all(need.is_met(self.value_of(value, need.option)) for need in needs)
            in_force = self._in_force(own) if has_effect else default_of(each)
            if in_force != own:
                replaced = with_origins(replace(value, **{each.name: in_force}), value.origins)
                return self._in_force(replaced)  # other options may need this one
        return value

    def must_meet(self, need: Need) -> bool:
        """Whether an unmet need is an error. Random data measures the speed of both tasks with the options of one."""
        return need.strict and not (need.option == "task" and self.data == "random")

    @property
    def why_no_program(self) -> str | None:
        """Why an export cannot have a program of this model, and what to do; None: it can."""
        if self.task == "ranking" and self.network.target_group_size > 1:
            return (
                f"with NetworkArgs.target_group_size = {self.network.target_group_size} a candidate sees the actions "
                "on others of its group, which a request does not know. Train with 1"
            )
        return None

    @property
    def data(self) -> str:
        """The kind of data: "stored" or "random"."""
        return "random" if isinstance(self.dataset, BenchmarkDatasetArgs) else "stored"

    def find(self, part: Args, option: str) -> tuple[Args, str]:
        """(object, parameter) of an option that a Need of ``part`` names. Without a class the object is ``part``."""
        cls, _, parameter = option.rpartition(".")
        return getattr(self, REGISTRY[CLASSES[cls]]) if cls else part, parameter

    def value_of(self, part: Args, option: str) -> Any:
        """The value of an option (see ``find``), "task" or "data"; None if this kind of dataset lacks the option."""
        if option in ("task", "data"):
            return getattr(self, option)
        other, parameter = self.find(part, option)
        return getattr(other, parameter) if parameter in other.__dataclass_fields__ else None

    @property
    def retrieval(self) -> RetrievalArgs | None:
        """The options of a retrieval run; None for a ranking run."""
        return self.task_args if isinstance(self.task_args, RetrievalArgs) else None

    @property
    def has_item_tower(self) -> bool:
        """Whether item vectors are computed from the features of the item in addition to its id."""
        return self.retrieval is not None and self.retrieval.item_tower

    @property
    def looks_up_negatives(self) -> bool:
        """Whether the loss compares with drawn items or the whole corpus, whose rows are looked up."""
        return self.retrieval is not None and self.retrieval.negatives != "in_batch"

    @property
    def max_items(self) -> int:
        """Items of the longest sequence, candidates included."""
        if isinstance(self.dataset, DatasetArgs):
            return self.dataset.max_sequence_length
        item = self.dataset.item_feature_name
        return next(group.max_sequence_length for group in self.dataset.feature_args if item in group.feature_names)

    @property
    def asks_for_next(self) -> bool:
        """Whether a retrieval query may have the time of the target event; see DatasetArgs.query_time."""
        return getattr(self.dataset, "query_time", "request") != "last_event"

    @property
    def reads_request_time(self) -> bool:
        """Whether retrieval of stored data depends on the time of the request."""
        reads = self.retrieval is not None and self.data == "stored" and self.network.needs_times
        return reads and self.asks_for_next

    @property
    def ranks_per_group(self) -> int:
        """Ranks that compute on the same sequences."""
        return self.tensor_parallel.tensor_model_parallel_size * self.context_parallel.context_parallel_size

    def all_args(self) -> list[Args]:
        """All argument objects, nested ones included, once each."""
        found = (part for each in fields(self) for part in args_in(getattr(self, each.name, None)))
        return list({id(part): part for part in found}.values())

    def operative_gin(self) -> str:
        """The effective configuration as gin text, defaults included. Loading it gives an equal RunConfig."""
        writer, scopes = _GinWriter(), {name: scope for (scope, _), name in SCOPED.items()}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Args):
                writer.write(value, scopes.get(each.name, ""))
            elif each.name == "numbers" or (each.name == "embeddings" and self.data == "stored"):
                writer.refer_to(value)  # BenchmarkDatasetArgs refers to its tables itself
        header = f"# The configuration in force, defaults included. Task: {self.task}."
        return "\n\n".join([header, *writer.blocks]) + "\n"


@dataclass(frozen=True, kw_only=True)
class RunDraft(RunConfig):
    """A configuration that is being checked. Reading a value that is wrong in the files raises Unknown."""

    world_size: int

    def __post_init__(self) -> None:
        """Disables the checks of RunConfig: rules check drafts."""

    def finish(self) -> RunConfig:
        """The RunConfig of a draft without problems."""
        return RunConfig(**{each.name: getattr(self, each.name) for each in fields(RunConfig)})


class _GinWriter:
    """Writes argument objects as gin blocks. Nested objects come first, each in its own scope."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self._scopes: set[str] = set()

    def _new_scope(self, name: str) -> str:
        """Makes ``name`` a unique identifier among the scopes of the file."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        base = base if re.match(r"[A-Za-z_]", base) else f"_{base}"
        scope, number = base, 2
        while scope in self._scopes:
            scope, number = f"{base}_{number}", number + 1
        self._scopes.add(scope)
        return scope

    def write(self, args: Args, scope: str = "") -> None:
        owner = f"{scope}/{type(args).__name__}" if scope else type(args).__name__
        values = {each.name: getattr(args, each.name) for each in options_of(type(args))}
        lines = [f"{owner}.{name} = {literal(self.refer_to(values[name], scope or name))}" for name in values]
        self.blocks.append("\n".join(lines))

    def refer_to(self, value: Any, base: str = "") -> Any:
        """Writes the argument objects in ``value`` and returns it with references to them.

        Scopes are called after tables, features or tasks, or else after the key in a dict or ``base``.
        """
        if isinstance(value, (list, tuple)):
            return type(value)(self.refer_to(element, base) for element in value)
        if isinstance(value, dict):
            return {key: self.refer_to(element, key) for key, element in value.items()}
        if not isinstance(value, Args):
            return value
        names = getattr(value, "feature_names", None) or [getattr(value, "task_name", base)]
        scope = self._new_scope(getattr(value, "table_name", names[0]))
        self.write(value, scope)
        return Reference(scope, type(value).__name__, call=True)
