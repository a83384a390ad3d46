"""Gin files and command-line bindings → RunConfig, or all that is wrong with them.

``load`` is all that the rest needs. In order: gin_scan.py reads statements, gin_bindings.py files them by class and
parameter, ``_Builder`` makes the argument objects, and what no object asked for is reported as never used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from hstu.config import user_code
from hstu.config.args import (
    Args,
    BenchmarkDatasetArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    LRScheduleArgs,
    NetworkArgs,
    OptimizerArgs,
    PartOptimizerArgs,
    PrecisionArgs,
    RankingArgs,
    RetrievalArgs,
    TensorModelParallelArgs,
    TrainerArgs,
)
from hstu.config.checks import default_of, describe, field_problems, is_required, takes_references
from hstu.config.errors import ConfigError
from hstu.config.gin_bindings import CLASSES, Bindings, Owner, find_class, written
from hstu.config.gin_scan import Binding, Broken, Macro, Reference, Scan, scan
from hstu.config.problems import Location, Origin, Problem, did_you_mean, in_reading_order, nearest, show
from hstu.config.run_config import Partial, RunConfig, Task, named_parts

TABLES = (EmbeddingArgs, DynamicEmbeddingArgs)
TASK_ARGS: Mapping[str, type[Args]] = {"ranking": RankingArgs, "retrieval": RetrievalArgs}
ALWAYS_READ = (TrainerArgs, NetworkArgs, OptimizerArgs, LRScheduleArgs, PrecisionArgs, TensorModelParallelArgs)


def load(files: Sequence[str], bindings: Sequence[str], task: Task) -> RunConfig:
    """Reads gin files (later ones win) and bindings (which win over files); ConfigError lists every problem.

    Checks across classes are separate: ``hstu.config.validate.validate``.
    """
    return read(files, bindings, task).finish()


def read(files: Sequence[str], bindings: Sequence[str], task: Task) -> Draft:
    """As ``load``, but does not raise: the draft holds what could be read, and the problems."""
    return _Builder(scan(files, bindings), files, task).draft()


@dataclass
class Draft:
    """What was read, right or wrong. ``parts`` and ``origins`` are as in RunConfig, wrong parts being Partial."""

    task: Task
    files: tuple[str, ...]
    parts: dict[str, Any]
    origins: dict[str, Mapping[str, Origin]]
    problems: list[Problem]
    complete: bool
    """False: a file could not be read, so that what does not fit together may be its fault."""

    def finish(self) -> RunConfig:
        """The RunConfig; ConfigError if there are problems."""
        if self.problems:
            raise ConfigError(in_reading_order(self.problems))
        part = self.parts
        benchmark = part.get("BenchmarkDatasetArgs")
        return RunConfig(
            task=self.task,
            trainer=part["TrainerArgs"],
            dataset=benchmark or part["DatasetArgs"],
            embeddings=tuple(table for name, table in part.items() if name.startswith("embeddings[")),
            network=part["NetworkArgs"],
            optimizer=part["OptimizerArgs"],
            schedule=part["LRScheduleArgs"],
            precision=part["PrecisionArgs"],
            tensor_parallel=part["TensorModelParallelArgs"],
            task_args=part[TASK_ARGS[self.task].__name__],
            source_files=self.files,
            origins=self.origins,
        )


class _Builder:
    """Makes argument objects from bindings and remembers which bindings were used."""

    def __init__(self, statements: Scan, files: Sequence[str], task: Task) -> None:
        self.files, self.task, self.complete = tuple(files), task, statements.complete
        self.problems = [*statements.problems, *user_code.run_imports(statements.imports)]
        self.bindings = Bindings(statements, self.problems)
        self._start = Location(1, 0, files[0] if files else "--gin-bindings")
        self._used: set[int] = set()
        self._referred: set[str] = set()
        self._objects: dict[Owner, Args | Partial] = {}
        self._origins: dict[int, Mapping[str, Origin]] = {}
        self._resolving: list[str] = []
        self._making: set[Owner] = set()
        self._references_wrong = False  # then what is referred to is not known

    def draft(self) -> Draft:
        self._bind_user_code()
        single = [self.object(("", cls)) for cls in (*ALWAYS_READ, TASK_ARGS[self.task])]
        dataset = self._dataset_class()
        if dataset:
            single.append(self.object(("", dataset)))
        tables = self._tables(single[-1] if dataset is BenchmarkDatasetArgs else None)
        if self.complete:
            self._report_unused(dataset)
        parts = named_parts(single, tables)
        origins = {name: self._origins.get(id(part), {}) for name, part in parts.items()}
        return Draft(self.task, self.files, parts, origins, self.problems, self.complete)

    def _dataset_class(self) -> type[Args] | None:
        """The one of the two kinds of dataset that the file describes."""
        found = [cls for cls in (DatasetArgs, BenchmarkDatasetArgs) if ("", cls) in self.bindings.by_owner]
        if len(found) == 1:
            return found[0]
        if found:
            at = max(next(iter(self.bindings.by_owner["", cls].values())).at for cls in found)
            text = "DatasetArgs and BenchmarkDatasetArgs are both bound; give one of them"
        else:
            at = self._start
            text = (
                "no dataset: bind DatasetArgs.dataset_name and DatasetArgs.max_sequence_length, "
                "or BenchmarkDatasetArgs for random data"
            )
        if found or self.complete:
            self.problems.append(Problem(text, at))
        return None

    def _tables(self, benchmark: Any) -> list[Any]:
        if benchmark is not None:
            known = getattr(benchmark, "embedding_args", ())
            return [table for table in known if isinstance(table, (Args, Partial))]
        owners = [owner for owner in self.bindings.by_owner if owner[1] in TABLES]
        scoped = {cls for scope, cls in owners if scope}
        # unscoped bindings beside scoped ones are their defaults, as in gin; alone they are one table
        made = [self.object(owner) for owner in owners if owner[0] or owner[1] not in scoped]
        return [table for table in made if not isinstance(table, Broken)]

    # --- objects ---

    def object(self, owner: Owner) -> Args | Partial:
        """The argument object of a class under a scope, made once."""
        if owner not in self._objects:
            self._making.add(owner)
            self._objects[owner] = self._make(owner)
            self._making.remove(owner)
        return self._objects[owner]

    def _make(self, owner: Owner) -> Args | Partial:
        scope, cls = owner
        bound = self._bound(owner)
        is_stray = self._is_stray(owner, bound)
        values: dict[str, Any] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            if field.name in bound:
                values[field.name] = self._given(cls, field, bound[field.name], scope)
            else:
                values[field.name] = Broken() if is_stray else self._left_out(owner, field, bound)
        known = {name: value for name, value in values.items() if not _holds(value, Broken)}
        complete = len(known) == len(values) and not any(_holds(value, Partial) for value in known.values())
        made = cls(**known) if complete else Partial(cls, known)
        self._origins[id(made)] = {name: Origin(b.at, b.name) for name, b in bound.items()}
        return made

    def _given(self, cls: type[Args], field: Field[Any], binding: Binding, scope: str) -> Any:
        """The value that is bound to a field, Broken if it is wrong."""
        value = self._resolve(binding.value, binding, scope)
        if _holds(value, Partial) and not takes_references(cls, field):
            problems = [f"expected {describe(cls, field)}"]
        else:
            problems = [] if _unfinished(value) else field_problems(cls, field, value)
        self._complain(binding, problems, value)
        if problems or _holds(value, Broken):
            self._references_wrong |= takes_references(cls, field)
            return Broken()
        return value

    def _left_out(self, owner: Owner, field: Field[Any], bound: Mapping[str, Binding]) -> Any:
        """The default of a field, Broken if there is none or it is not valid by itself."""
        cls = owner[1]
        value = Broken() if is_required(field) else default_of(field)
        if is_required(field):
            problems = [f"is required and not bound; expected {describe(cls, field)}"]
        else:
            problems = field_problems(cls, field, value)
        if problems and self.complete:
            place = self._place(bound)
            self.problems += [Problem(f"{written(owner)}.{field.name} {problem}", place) for problem in problems]
        return Broken() if problems else value

    def _is_stray(self, owner: Owner, bound: Mapping[str, Binding]) -> bool:
        """Whether this is a table that lacks parameters under a scope that looks like a misspelling; says so."""
        scope, cls = owner
        missing = [f.name for f in fields(cls) if is_required(f) and f.name not in bound]  # type: ignore[arg-type]
        guess = nearest(scope, [other for other in self.bindings.scopes_of(*TABLES) if other != scope])
        if not (scope and cls in TABLES and missing and guess):
            return False
        text = f"{written(owner)} lacks {', '.join(missing)}; is the scope {scope!r} a misspelling of {guess!r}?"
        self.problems.append(Problem(text, self._place(bound)))
        return True

    def _bound(self, owner: Owner) -> dict[str, Binding]:
        """The bindings in force under a scope: those of the outer scopes first, inner ones win, as in gin."""
        scope, cls = owner
        names = scope.split("/") if scope else []
        bound: dict[str, Binding] = {}
        for depth in range(len(names) + 1):
            found = self.bindings.by_owner.get(("/".join(names[:depth]), cls), {})
            self._used |= {id(binding) for binding in found.values()}
            bound |= found
        return bound

    def _place(self, bound: Mapping[str, Binding]) -> Location:
        """Where to report what is not there: the first line about the same object, else the file."""
        return min((binding.at for binding in bound.values()), default=self._start)

    def _complain(self, binding: Binding, problems: Sequence[str], value: Any) -> None:
        shown = show(binding.value)
        if show(value) != shown and not isinstance(value, Args):
            shown += f" (which is {show(value)})"
        self.problems += [Problem(f"{binding.name} = {shown}: {problem}", binding.at) for problem in problems]

    # --- values ---

    def _resolve(self, value: Any, binding: Binding, scope: str) -> Any:
        """The value with references made into objects and macros replaced; Broken where that fails."""
        match value:
            case list() | tuple():
                return type(value)(self._resolve(element, binding, scope) for element in value)
            case dict():
                return {key: self._resolve(element, binding, scope) for key, element in value.items()}
            case Macro():
                return self._resolve_macro(value, binding, scope)
            case Reference():
                return self._resolve_reference(value, binding, scope)
        return value

    def _fail(self, binding: Binding, text: str) -> Broken:
        self.problems.append(Problem(f"{binding.name} = {show(binding.value)}: {text}", binding.at))
        return Broken()

    def _resolve_macro(self, macro: Macro, binding: Binding, scope: str) -> Any:
        if macro.name in self._resolving:
            return self._fail(binding, f"the macro {macro} is defined by itself")
        definition = self.bindings.macros.get(macro.name)
        if definition is None:
            found, value = user_code.constant(macro)
            if found:
                return value
            guess = nearest(macro.name, self.bindings.macros)
            if guess:  # then that one is not also unused
                self._used.add(id(self.bindings.macros[guess]))
            known = did_you_mean(macro.name, self.bindings.macros)
            return self._fail(binding, f"there is no macro or constant {macro}{known}")
        self._used.add(id(definition))
        self._resolving.append(macro.name)
        value = self._resolve(definition.value, definition, scope)
        self._resolving.pop()
        return value

    def _resolve_reference(self, reference: Reference, binding: Binding, scope: str) -> Any:
        cls = find_class(reference.selector)
        if cls is None:
            return self._call_user_code(reference, binding)
        if not reference.call:
            return self._fail(binding, f"a reference needs parentheses: {reference}()")
        owner = (reference.scope or scope, cls)
        self._referred.add(written(owner))
        if reference.scope and owner not in self.bindings.by_owner:
            bound = [written(other) for other in self.bindings.by_owner if other[0]]
            guess = nearest(written(owner), bound)
            hint = f"; did you mean '@{guess}()'?" if guess else ""
            return self._fail(binding, f"nothing is bound to {written(owner)}{hint}")
        if owner in self._making:
            return self._fail(binding, f"{reference} is part of itself")
        return self.object(owner)

    def _call_user_code(self, reference: Reference, binding: Binding) -> Any:
        if not user_code.is_registered(reference.selector):
            hint = did_you_mean(reference.selector, CLASSES)
            return self._fail(binding, f"there is no class or function {reference.selector}{hint}")
        self._referred.add(reference.selector)
        try:
            return user_code.evaluate(reference)
        except Exception as error:  # user code may raise anything
            return self._fail(binding, f"{reference} raised {type(error).__name__}: {error}")

    def _bind_user_code(self) -> None:
        user_code.forget_bindings()
        for binding in sorted(self.bindings.user, key=lambda b: _holds(b.value, Reference)):
            value = self._resolve(binding.value, binding, binding.scope)
            try:
                user_code.bind(binding.scope, binding.selector, binding.parameter, value)
            except ValueError as error:
                self._fail(binding, str(error).strip().splitlines()[0])

    # --- what no one asked for ---

    def _report_unused(self, dataset: type[Args] | None) -> None:
        for owner, bound in self.bindings.by_owner.items():
            for binding in bound.values():
                if id(binding) not in self._used and not isinstance(binding.value, Broken):
                    self._report(owner, binding, dataset)
        for binding in self.bindings.macros.values():
            if id(binding) not in self._used and not isinstance(binding.value, Broken):
                text = f"never used: nothing refers to %{binding.name}"
                self._fail(binding, text + did_you_mean(binding.name, CLASSES))
        called = {name.rpartition(".")[2] for name in self._referred}
        for binding in self.bindings.user:
            if binding.selector.rpartition(".")[2] not in called:
                self._fail(binding, f"never used: nothing refers to @{binding.selector}()")

    def _report(self, owner: Owner, binding: Binding, dataset: type[Args] | None) -> None:
        scope, cls = owner
        if cls in (DatasetArgs, BenchmarkDatasetArgs) and not scope:
            return  # both are bound: reported once for all
        if cls in TASK_ARGS.values() and cls is not TASK_ARGS[self.task]:
            self._fail(binding, f"never used: this is a {self.task} run, which reads {TASK_ARGS[self.task].__name__}")
        elif scope and cls in (*ALWAYS_READ, *TASK_ARGS.values(), DatasetArgs, BenchmarkDatasetArgs):
            self._fail(binding, f"never used: {cls.__name__} is read without a scope; drop {scope}/")
        elif dataset is BenchmarkDatasetArgs or cls in (*TABLES, PartOptimizerArgs):
            if not self._references_wrong:
                hint = did_you_mean(written(owner), self._referred)
                self._fail(binding, f"never used: nothing refers to @{written(owner)}(){hint}")
        elif dataset is DatasetArgs:
            self._fail(binding, f"never used: {cls.__name__} belongs to BenchmarkDatasetArgs")


def _unfinished(value: Any) -> bool:
    return _holds(value, Broken) or _holds(value, Partial)


def _holds(value: Any, kind: type) -> bool:
    return any(isinstance(leaf, kind) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, dict)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _leaves(element)
    else:
        yield value
