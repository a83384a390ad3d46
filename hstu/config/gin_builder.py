"""From the statements of gin files to argument objects, and a report of those that none of them uses."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field
from typing import Any

import gin

from hstu.config.args import (
    CLASSES,
    REGISTRY,
    SEVERAL,
    TASK_ARGS,
    Args,
    BenchmarkDatasetArgs,
    EmbeddingArgs,
    NumericFeatureArgs,
    Task,
)
from hstu.config.gin_bindings import (
    Bindings,
    Owner,
    constant,
    evaluate,
    find_class,
    is_registered,
    run_imports,
    written,
)
from hstu.config.gin_scan import Binding, Broken, Macro, Reference, Scan
from hstu.config.incomplete import incomplete
from hstu.config.option import (
    Mismatch,
    annotation_of,
    converted,
    default_of,
    describe,
    field_problems,
    is_required,
    options_of,
    probably_meant,
    referred_class,
)
from hstu.config.problems import Location, Origin, Problem, did_you_mean, nearest, show
from hstu.config.run_config import RunDraft

REFERRERS = {kind: cls for cls in REGISTRY for field in options_of(cls) if (kind := referred_class(cls, field))}
"""Class that others refer to → the class that has a field for it."""


class ConfigBuilder:
    """Makes argument objects from bindings and records which bindings are used."""

    def __init__(self, statements: Scan, files: Sequence[str], task: Task) -> None:
        self.files, self.task, self.complete = tuple(files), task, statements.complete
        self._is_stored = statements.is_stored
        self.problems = [*statements.problems, *run_imports(statements.imports)]
        self.bindings = Bindings(statements, self.problems)
        self._start = Location(1, 0, files[0] if files else "--gin-bindings")
        self._used: set[int] = set()
        self._referred: set[str] = set()
        self._unclear: list[type[Args]] = []  # wrong values hide which objects of these classes are referred to
        self._objects: dict[Owner, Args] = {}
        self._origins: dict[int, Mapping[str, Origin]] = {}
        self._resolving: list[str] = []
        self._making: set[Owner] = set()
        self._strays: set[int] = set()  # objects whose scope is probably a misspelling of another

    def draft(self, world_size: int) -> RunDraft:
        """The run that the files describe, without the values that are wrong."""
        self._bind_user_code()
        for binding in self.bindings.not_in_force:
            self._mark_used(binding)
        known: dict[str, Any] = {"task": self.task, "source_files": self.files, "world_size": world_size}
        dataset = self._dataset_class()
        for cls, place in REGISTRY.items():
            if place not in ("", *SEVERAL, "dataset", "task_args") or cls in (dataset, TASK_ARGS[self.task]):
                known[place] = self.object(("", cls))
        if dataset is BenchmarkDatasetArgs:
            tables = getattr(known["dataset"], "embedding_args", None)
        else:
            tables = [self.object(owner) for owner in self.bindings.owners_of(EmbeddingArgs)]
        if tables is not None and (self.complete or dataset is BenchmarkDatasetArgs):
            known["embeddings"] = tuple(table for table in tables if id(table) not in self._strays)
        if self.complete:
            numbers = [self.object(owner) for owner in self.bindings.owners_of(NumericFeatureArgs)]
            known["numbers"] = tuple(each for each in numbers if id(each) not in self._strays)
        for referred in self._unclear:  # the list grows while their objects are made
            for owner in self.bindings.owners_of(referred):
                self.object(owner)
        self._check_unused(dataset is not None)
        parts = incomplete(RunDraft, known).parts()
        origins = {name: self._origins.get(id(part), {}) for name, part in parts.items()}
        return incomplete(RunDraft, known | {"origins": origins})

    def _dataset_class(self) -> type[Args] | None:
        """The one of the two kinds of dataset that the files describe."""
        kinds = [cls for cls, place in REGISTRY.items() if place == "dataset"]
        found = {cls: bound for cls in kinds if (bound := self.bindings.by_owner.get(("", cls)))}
        if len(found) > 1:
            at = max(next(iter(bound.values())).at for bound in found.values())
            names = " and ".join(cls.__name__ for cls in found)
            self.problems.append(Problem(f"{names} are both bound; remove one of them", at))
        if found:  # of two, the one that lacks fewer parameters is probably the one to keep
            return min(found, key=lambda cls: sum(is_required(f) and f.name not in found[cls] for f in options_of(cls)))
        if self.complete:
            text = (
                "no dataset: bind DatasetArgs.dataset_name and DatasetArgs.max_sequence_length, "
                "or BenchmarkDatasetArgs for random data"
            )
            self.problems.append(Problem(text, self._start))
        return None

    # --- objects ---

    def object(self, owner: Owner) -> Args:
        """The argument object of a class under a scope, made once; incomplete if some of its values are wrong."""
        if owner not in self._objects:
            self._making.add(owner)
            self._objects[owner] = self._make(owner)
            self._making.remove(owner)
        return self._objects[owner]

    def _make(self, owner: Owner) -> Args:
        scope, cls = owner
        bound = self._bound(owner)
        is_stray = self._is_stray(owner, bound)
        leaves_out = not self.complete or is_stray
        values: dict[str, Any] = {}
        for field in options_of(cls):
            if field.name in bound:
                values[field.name] = self._given(cls, field, bound[field.name], scope)
            else:
                values[field.name] = Broken() if leaves_out else self._left_out(owner, field, bound)
        for name, addend in _sums(cls, bound):
            is_known = not isinstance(values[name], Broken) and not isinstance(values[addend], Broken)
            values[name] = values[name] + values[addend] if is_known else Broken()
        known = {name: value for name, value in values.items() if not _holds(value, Broken)}
        made = cls(**known) if len(known) == len(values) else incomplete(cls, known)
        if is_stray:
            self._strays.add(id(made))
        self._origins[id(made)] = {
            name: Origin(binding.at, binding.name, show(binding.value)) for name, binding in bound.items()
        }
        return made

    def _given(self, cls: type[Args], field: Field[Any], binding: Binding, scope: str) -> Any:
        """The value that is bound to a field, or the one that was probably meant; Broken if that is unclear."""
        value = self._resolve(binding.value, binding, scope)
        problems = [] if _holds(value, Broken) else field_problems(cls, field, value)
        shown = show(binding.value)
        if show(value) != shown and not _holds(value, Args):
            shown += f" (which is {show(value)})"
        self.problems += [Problem(f"{binding.name} = {shown}: {problem}", binding.at) for problem in problems]
        if not problems and not _holds(value, Broken):
            return converted(cls, field, value)
        return self._probably_meant(cls, field, value)

    def _probably_meant(self, cls: type[Args], field: Field[Any], value: Any) -> Any:
        """A value in place of a wrong one, so that it hides no other mistake; Broken if none is likely.

        A list of references is taken to hold all objects of its class.
        """
        referred = referred_class(cls, field)
        if referred is not None:
            self._note_unclear(cls, field)
            if typing.get_origin(annotation_of(cls, field)) is not list:
                return Broken()
            owners = [owner for owner in self.bindings.owners_of(referred) if owner not in self._making]
            value = [each for each in map(self.object, owners) if id(each) not in self._strays]
        elif isinstance(value, Broken) and value.guesses:
            value = value.guesses[0]
        try:
            return Broken() if _holds(value, Broken) else probably_meant(cls, field, value)
        except Mismatch:
            return Broken()

    def _left_out(self, owner: Owner, field: Field[Any], bound: Mapping[str, Binding]) -> Any:
        """The default of a field; Broken if there is none or if it is invalid."""
        cls = owner[1]
        if is_required(field):
            value = self._probably_meant(cls, field, Broken())
            problems = [f"is required and not bound; expected {describe(cls, field)}"]
        else:
            value = default_of(field)
            problems = field_problems(cls, field, value)
        at = self._location_of(bound)
        self.problems += [Problem(f"{written(owner)}.{field.name} {problem}", at) for problem in problems]
        return value if not problems or is_required(field) else Broken()

    def _note_unclear(self, cls: type[Args], field: Field[Any]) -> None:
        referred = referred_class(cls, field)
        if referred is not None and referred not in self._unclear:
            self._unclear.append(referred)

    def _is_stray(self, owner: Owner, bound: Mapping[str, Binding]) -> bool:
        """Whether this object lacks parameters because its scope is probably misspelt. Reports it."""
        scope, cls = owner
        others = [
            other for other, kind in self.bindings.by_owner if REGISTRY[kind] == REGISTRY[cls] != "" or kind is cls
        ]
        missing = [field.name for field in options_of(cls) if is_required(field) and field.name not in bound]
        guess = nearest(scope, [other for other in others if other and other != scope])
        if not (scope and missing and guess) or written(owner) in self._referred:
            return False
        text = f"{written(owner)} lacks {', '.join(missing)}; is the scope {scope!r} a misspelling of {guess!r}?"
        self.problems.append(Problem(text, self._location_of(bound)))
        return True

    def _bound(self, owner: Owner) -> dict[str, Binding]:
        """The bindings in force under a scope. Inner scopes win over outer ones, as in gin."""
        scope, cls = owner
        names = scope.split("/") if scope else []
        bound: dict[str, Binding] = {}
        for depth in range(len(names) + 1):
            found = self.bindings.by_owner.get(("/".join(names[:depth]), cls), {})
            self._used |= {id(binding) for binding in found.values()}
            bound |= found
        return bound

    def _location_of(self, bound: Mapping[str, Binding]) -> Location:
        """Where to report what an object lacks: the first line about it, or else the file."""
        return min((binding.at for binding in bound.values()), default=self._start)

    # --- values ---

    def _resolve(self, value: Any, binding: Binding, scope: str) -> Any:
        """The value with objects in place of references and macros; Broken in place of those that are wrong."""
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
        self.problems.append(Problem(f"{binding}: {text}", binding.at))
        return Broken()

    def _resolve_macro(self, macro: Macro, binding: Binding, scope: str) -> Any:
        if macro.name in self._resolving:
            return self._fail(binding, f"the macro {macro} is defined by itself; give it a value")
        definition = self.bindings.macros.get(macro.name)
        if definition is None:
            found, value = constant(macro)
            if found:
                return value
            guess = nearest(macro.name, self.bindings.macros)
            hint = f"; did you mean {guess!r}?" if guess else f"; define it: {macro.name} = value"
            self._fail(binding, f"there is no macro or constant {macro}{hint}")
            if guess is None or guess in self._resolving:
                return Broken()
            definition = self.bindings.macros[guess]
        self._used.add(id(definition))
        self._resolving.append(definition.name)
        value = self._resolve(definition.value, definition, scope)
        self._resolving.pop()
        return value

    def _resolve_reference(self, reference: Reference, binding: Binding, scope: str) -> Any:
        cls = find_class(reference.selector)
        if cls is None:
            return self._call_user_code(reference, binding)
        if not reference.call:
            self._fail(binding, f"a reference needs parentheses: {reference}()")
        owner = (reference.scope or scope, cls)
        if reference.scope and owner not in self.bindings.by_owner:
            bound = {written(other): other for other in self.bindings.by_owner if other[0]}
            guess = nearest(written(owner), bound)
            hint = f"; did you mean '@{guess}()'?" if guess else f"; bind its parameters: {written(owner)}.parameter"
            self._fail(binding, f"nothing is bound to {written(owner)}{hint}")
            if guess is None or not issubclass(bound[guess][1], cls):
                return Broken()
            owner = bound[guess]
        self._referred.add(written(owner))
        if owner in self._making:
            return self._fail(binding, f"{reference} is part of itself; remove it")
        return self.object(owner)

    # --- the user's own functions ---

    def _call_user_code(self, reference: Reference, binding: Binding) -> Any:
        if self._is_stored or not is_registered(reference.selector):
            hint = did_you_mean(reference.selector, CLASSES) or "; import the module that registers it with gin"
            return self._fail(binding, f"there is no class or function {reference.selector}{hint}")
        self._referred.add(reference.selector)
        try:
            return evaluate(reference)
        except Exception as error:  # user code may raise anything
            return self._fail(binding, f"{reference} raised {type(error).__name__}: {error}")

    def _bind_user_code(self) -> None:
        if self._is_stored:
            for binding in self.bindings.user:
                self._fail(binding, "a stored configuration must not bind parameters of other code")
            return
        gin.clear_config()  # so that loading twice in a process does not mix two files
        for binding in sorted(
            self.bindings.user, key=lambda b: any(isinstance(x, Reference) for x in _leaves(b.value))
        ):
            value = self._resolve(binding.value, binding, binding.scope)
            try:
                gin.bind_parameter((binding.scope, binding.selector, binding.parameter), value)
            except ValueError as error:
                self._fail(binding, str(error).strip().splitlines()[0])

    # --- what nothing refers to ---

    def _mark_used(self, binding: Binding) -> None:
        """Takes what a binding that is not in force refers to for used."""
        for leaf in _leaves(binding.value):
            referred: list[Binding] = []
            if isinstance(leaf, Macro) and leaf.name in self.bindings.macros:
                referred = [self.bindings.macros[leaf.name]]
            elif isinstance(leaf, Reference) and (cls := find_class(leaf.selector)) is not None:
                owner = (leaf.scope or binding.scope, cls)
                referred = list(self.bindings.by_owner.get(owner, {}).values())
            for each in referred:
                if id(each) not in self._used:
                    self._used.add(id(each))
                    self._mark_used(each)

    def _check_unused(self, has_dataset: bool) -> None:
        """Reports bindings that no object uses, and also checks their values."""
        unused = [
            (owner, parameter, binding)
            for owner, bound in self.bindings.by_owner.items()
            for parameter, binding in bound.items()
            if id(binding) not in self._used and not isinstance(binding.value, Broken)
        ]
        for owner, _, binding in unused:
            if (reason := self._reason_unused(owner, has_dataset)) is not None:
                self._fail(binding, f"never used: {reason}")
        for (scope, cls), parameter, binding in unused:
            self._given(cls, next(field for field in options_of(cls) if field.name == parameter), binding, scope)
        if not self.complete:
            return
        for binding in self.bindings.macros.values():
            if id(binding) not in self._used and not isinstance(binding.value, Broken):
                hint = did_you_mean(binding.name, CLASSES) or "; remove it"
                self._fail(binding, f"never used: nothing refers to %{binding.name}{hint}")
        called = {name.rpartition(".")[2] for name in self._referred}
        for binding in self.bindings.user:
            if binding.selector.rpartition(".")[2] not in called:
                self._fail(binding, f"never used: nothing refers to @{binding.selector}()")

    def _reason_unused(self, owner: Owner, has_dataset: bool) -> str | None:
        """Why no object uses the bindings of ``owner``; None if a problem that is reported already explains it."""
        scope, cls = owner
        place = REGISTRY[cls]
        if place == "task_args" and cls is not TASK_ARGS[self.task]:
            return f"this is a {self.task} run, which reads {TASK_ARGS[self.task].__name__}; remove it"
        if place not in ("", *SEVERAL):
            return f"{cls.__name__} is read without a scope; drop {scope}/" if scope else None
        if not self.complete:  # a file that cannot be read may refer to it
            return None
        root = cls
        while not REGISTRY[root]:
            root = REFERRERS[root]
        if REGISTRY[root] not in SEVERAL and ("", root) not in self._objects:
            return f"{cls.__name__} belongs to {root.__name__}, which no file binds; remove it" if has_dataset else None
        hint = did_you_mean(written(owner), self._referred) or "; refer to it, or remove it"
        return f"nothing refers to @{written(owner)}(){hint}"


def _sums(cls: type[Args], bound: Mapping[str, Binding]) -> Iterator[tuple[str, str]]:
    """(field, other field) where ``bound`` gives the difference of the two by an alias of the first."""
    for field in options_of(cls):
        addend = field.metadata["aliases"].get(bound[field.name].parameter) if field.name in bound else None
        if addend is not None:
            yield field.name, addend


def _holds(value: Any, kind: type) -> bool:
    return any(isinstance(leaf, kind) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, dict)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _leaves(element)
    else:
        yield value
