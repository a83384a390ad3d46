"""Builds argument objects from the bindings of gin files, and reports bindings that no object uses.

A misspelt name is reported and read as the most similar name, so that the rest of the binding is checked too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, replace
from typing import Any

from hstu.config.args import (
    ACCEPTED,
    CLASSES,
    REGISTRY,
    REMOVED_DEFAULTS,
    SCOPED,
    SEVERAL,
    TASK_ARGS,
    Args,
    BenchmarkDatasetArgs,
    EmbeddingArgs,
    NumericFeatureArgs,
    Task,
)
from hstu.config.gin_scan import Broken, Macro, Reference, Scan
from hstu.config.option import (
    converted,
    default_of,
    describe,
    field_problems,
    is_required,
    options_of,
    referred_class,
    with_origins,
)
from hstu.config.problems import Binding, Location, Problem, did_you_mean, incomplete, nearest, show
from hstu.config.run_config import RunDraft

Owner = tuple[str, type[Args]]
"""(scope, class) of a group of bindings."""


class ConfigBuilder:
    """Builds argument objects from bindings and collects ``problems``."""

    def __init__(self, statements: Scan, files: Sequence[str], task: Task, *, is_stored: bool = False) -> None:
        """``is_stored``: this program wrote the text, perhaps in an earlier version; see REMOVED_DEFAULTS."""
        self.files, self.task, self.complete = tuple(files), task, statements.complete
        self.problems = [*statements.problems]
        self._statements = statements.bindings
        self._is_stored = is_stored
        self._start = Location(1, 0, files[0] if files else "--gin-bindings")
        self._by_owner: dict[Owner, dict[str, Binding]] = {}
        self._macros: dict[str, Binding] = {}
        self._seen: dict[tuple[int, str, str], Binding] = {}
        self._objects: dict[Owner, Args] = {}
        self._resolving: list[str] = []
        self._making: set[Owner] = set()
        self._unclear: set[type[Args]] = set()  # wrong values hide references to these classes
        for binding in self._statements:
            self._file(binding)

    def draft(self, world_size: int) -> RunDraft:
        """The run that the files describe, without wrong values."""
        known: dict[str, Any] = {"task": self.task, "source_files": self.files, "world_size": world_size}
        dataset = self._dataset_class()
        for cls, field_name in REGISTRY.items():
            if field_name not in ("", *SEVERAL, "dataset", "task_args") or cls in (dataset, TASK_ARGS[self.task]):
                known[field_name] = self._object(("", cls))
        known |= {name: self._object(owner) if owner in self._by_owner else None for owner, name in SCOPED.items()}
        if dataset is BenchmarkDatasetArgs:
            if (tables := getattr(known["dataset"], "embedding_args", None)) is not None:
                known["embeddings"] = tuple(tables)
        elif self.complete:
            known["embeddings"] = self._several(EmbeddingArgs)
        if self.complete:
            known["numbers"] = self._several(NumericFeatureArgs)
        for owner in [owner for cls in self._unclear for owner in self._owners_of(cls)]:
            self._object(owner)
        self._check_unused()
        return incomplete(RunDraft, known)

    def _dataset_class(self) -> type[Args] | None:
        """The dataset class that the files bind. Reports a problem if they bind none or both."""
        kinds = [cls for cls, field_name in REGISTRY.items() if field_name == "dataset"]
        found = {cls: bound for cls in kinds if (bound := self._by_owner.get(("", cls)))}
        if len(found) > 1:
            at = max(next(iter(bound.values())).at for bound in found.values())
            names = " and ".join(cls.__name__ for cls in found)
            self.problems.append(Problem(f"{names} are both bound; remove one of them", at))
        if found:  # of two, the user probably keeps the one with fewer missing parameters
            return min(found, key=lambda cls: len(_missing(cls, found[cls])))
        if self.complete:
            text = (
                "no dataset: bind DatasetArgs.dataset_name and DatasetArgs.max_sequence_length, "
                "or BenchmarkDatasetArgs for random data"
            )
            self.problems.append(Problem(text, self._start))
        return None

    def _several(self, cls: type[Args]) -> tuple[Any, ...]:
        """The bound objects of a class and its subclasses, in file order."""
        return tuple(self._object(owner) for owner in self._owners_of(cls))

    def _owners_of(self, cls: type[Args]) -> list[Owner]:
        """Owners of objects. As in gin, bindings without a scope are defaults for scoped ones, or else one object."""
        owners = [owner for owner in self._by_owner if issubclass(owner[1], cls)]
        scoped = {kind for scope, kind in owners if scope}
        return [owner for owner in owners if owner[0] or owner[1] not in scoped]

    # --- bindings by class and parameter ---

    def _file(self, binding: Binding) -> None:
        cls = find_class(binding.selector)
        if not binding.parameter:
            self._check_twice(binding, binding.name, "")
            if cls:
                self._fail(binding, f"is a class; bind one of its parameters: {cls.__name__}.parameter = value")
                binding = replace(binding, value=Broken())
            self._macros[binding.name] = binding
        elif cls:
            self._file_parameter(cls, binding)
        else:
            guess = nearest(binding.selector, CLASSES)
            hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(CLASSES)}"
            self._fail(binding, f"there is no class {binding.selector}; {hint}")
            if guess:
                self._file_parameter(CLASSES[guess], binding, is_guess=True)

    def _file_parameter(self, cls: type[Args], binding: Binding, is_guess: bool = False) -> None:
        if binding.parameter in ACCEPTED:
            self._fail(binding, ACCEPTED[binding.parameter], is_warning=True)
            return
        names = {name: option.name for option in options_of(cls) for name in (option.name, *option.metadata["aliases"])}
        if self._is_stored and binding.parameter not in names:
            default = REMOVED_DEFAULTS.get(f"{cls.__name__}.{binding.parameter}", binding.value)
            if default != binding.value:
                self._fail(binding, "decided the labels or the tables, and was removed: train anew")
            return
        bound = self._by_owner.setdefault((binding.scope, cls), {})
        if binding.parameter in names:
            parameter = names[binding.parameter]
            self._check_twice(binding, written((binding.scope, cls)), parameter)
            bound[parameter] = binding
            return
        guess = nearest(binding.parameter, names)
        if guess or not is_guess:
            self._fail(binding, _no_such_parameter(cls, binding.parameter, guess, names))
        if guess:
            as_meant = binding if guess == names[guess] else replace(binding, parameter=guess)
            bound.setdefault(names[guess], as_meant)

    def _check_twice(self, binding: Binding, owner: str, parameter: str) -> None:
        first = self._seen.setdefault((binding.at.source, owner, parameter), binding)
        if first is binding or isinstance(first.value, Broken) or isinstance(binding.value, Broken):
            return
        other = f" as {first.parameter}" if first.parameter != binding.parameter else ""
        is_equal = not other and repr(first.value) == repr(binding.value)
        text = f"bound twice: already {show(first.value)}{other} at {first.at}; keep one of them"
        self._fail(binding, text, is_warning=is_equal)

    def _fail(self, binding: Binding, text: str, is_warning: bool = False) -> Broken:
        self.problems.append(Problem(f"{binding}: {text}", binding.at, is_warning))
        return Broken()

    # --- objects ---

    def _object(self, owner: Owner) -> Args:
        """The argument object of a class and scope, built once; incomplete if some of its values are wrong."""
        if owner not in self._objects:
            self._making.add(owner)
            self._objects[owner] = self._make(owner)
            self._making.remove(owner)
        return self._objects[owner]

    def _make(self, owner: Owner) -> Args:
        scope, cls = owner
        bound: dict[str, Binding] = {}
        for outer in _with_outer_scopes(owner):  # inner scopes win over outer ones, as in gin
            bound |= self._by_owner.get(outer, {})
        values: dict[str, Any] = {}
        for field in options_of(cls):
            if field.name in bound:
                values[field.name] = self._given(cls, field, bound[field.name], scope)
            else:
                values[field.name] = self._left_out(owner, field, bound) if self.complete else Broken()
            if isinstance(values[field.name], Broken) and (referred := referred_class(cls, field)):
                self._unclear.add(referred)
        for field in options_of(cls):
            if field.name in bound and (addend := field.metadata["aliases"].get(bound[field.name].parameter)):
                terms = values[field.name], values[addend]
                values[field.name] = Broken() if _holds(terms, Broken) else sum(terms)
        known = {name: value for name, value in values.items() if not isinstance(value, Broken)}
        made = cls(**known) if len(known) == len(values) else incomplete(cls, known)
        return with_origins(made, bound)

    def _given(self, cls: type[Args], field: Field[Any], binding: Binding, scope: str) -> Any:
        value = self._resolve(binding.value, binding, scope)
        if _holds(value, Broken):
            return Broken()
        if problems := field_problems(cls, field, value):
            shown = show(binding.value)
            if show(value) != shown and not _holds(value, Args):
                shown += f" (which is {show(value)})"
            self.problems += [Problem(f"{binding.name} = {shown}: {problem}", binding.at) for problem in problems]
            return Broken()
        return converted(cls, field, value)

    def _left_out(self, owner: Owner, field: Field[Any], bound: Mapping[str, Binding]) -> Any:
        """The default of a field; Broken if it is missing or invalid."""
        cls = owner[1]
        if is_required(field):
            problems = [f"is required and not bound; expected {describe(cls, field)}"]
        else:
            problems = field_problems(cls, field, default_of(field))
        at = min((binding.at for binding in bound.values()), default=self._start)  # the first line about the object
        self.problems += [Problem(f"{written(owner)}.{field.name} {problem}", at) for problem in problems]
        return Broken() if problems else default_of(field)

    # --- values ---

    def _resolve(self, value: Any, binding: Binding, scope: str) -> Any:
        """``value`` with references and macros replaced by objects and values, or by Broken if they are wrong."""
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

    def _resolve_macro(self, macro: Macro, binding: Binding, scope: str) -> Any:
        if macro.name in self._resolving:
            return self._fail(binding, f"the macro {macro} is defined by itself; give it a value")
        if macro.name not in self._macros:
            hint = did_you_mean(macro.name, self._macros) or f"; define it: {macro.name} = value"
            return self._fail(binding, f"there is no macro {macro}{hint}")
        definition = self._macros[macro.name]
        self._resolving.append(definition.name)
        value = self._resolve(definition.value, definition, scope)
        self._resolving.pop()
        return value

    def _resolve_reference(self, reference: Reference, binding: Binding, scope: str) -> Any:
        cls = find_class(reference.selector)
        if cls is None:
            hint = did_you_mean(reference.selector, CLASSES)
            return self._fail(binding, f"there is no class {reference.selector}{hint}")
        if not reference.call:
            self._fail(binding, f"a reference needs parentheses: {reference}()")
        owner = (reference.scope or scope, cls)
        if reference.scope and owner not in self._by_owner:
            bound = {written(other): other for other in self._by_owner if other[0]}
            guess = nearest(written(owner), bound)
            hint = f"; did you mean '@{guess}()'?" if guess else f"; bind its parameters: {written(owner)}.parameter"
            self._fail(binding, f"nothing is bound to {written(owner)}{hint}")
            if guess is None or not issubclass(bound[guess][1], cls):
                return Broken()
            owner = bound[guess]
        if owner in self._making:
            return self._fail(binding, f"{reference} is part of itself; remove it")
        return self._object(owner)

    # --- what nothing refers to ---

    def _check_unused(self) -> None:
        """Reports bindings that no object uses. References in overridden bindings count as uses."""
        leaves = [(binding.scope, leaf) for binding in self._statements for leaf in _leaves(binding.value)]
        macros = {leaf.name for _, leaf in leaves if isinstance(leaf, Macro)}
        referred = {
            (leaf.scope or scope, cls)
            for scope, leaf in leaves
            if isinstance(leaf, Reference) and (cls := find_class(leaf.selector))
        }
        used = {outer for owner in {*self._objects, *referred} for outer in _with_outer_scopes(owner)}
        for owner in self._by_owner.keys() - used:
            if (reason := self._reason_unused(owner, referred)) is not None:
                for binding in self._by_owner[owner].values():
                    if not isinstance(binding.value, Broken):
                        self._fail(binding, f"never used: {reason}")
        for name, binding in self._macros.items():
            if self.complete and name not in macros and not isinstance(binding.value, Broken):
                hint = did_you_mean(name, CLASSES) or "; remove it"
                self._fail(binding, f"never used: nothing refers to %{name}{hint}")

    def _reason_unused(self, owner: Owner, referred: set[Owner]) -> str | None:
        """Why no object uses the bindings of ``owner``; None if a reported problem already explains it."""
        scope, cls = owner
        field_name = REGISTRY[cls]
        if field_name == "task_args" and cls is not TASK_ARGS[self.task]:
            return f"this is a {self.task} run, which reads {TASK_ARGS[self.task].__name__}; remove it"
        if field_name not in ("", *SEVERAL):
            others = "".join(f" or as {written(other)}" for other in SCOPED if other[1] is cls)
            return f"{cls.__name__} is read without a scope{others}; drop {scope}/" if scope else None
        if not self.complete:  # an unreadable file may refer to it
            return None
        hint = did_you_mean(written(owner), map(written, referred)) or "; refer to it, or remove it"
        return f"nothing refers to @{written(owner)}(){hint}"


def written(owner: Owner) -> str:
    """The owner in gin syntax: ``scope/Class``."""
    scope, cls = owner
    return f"{scope}/{cls.__name__}" if scope else cls.__name__


def find_class(selector: str) -> type[Args] | None:
    """The class with this name. As in gin, modules may precede it: ``hstu.config.args.NetworkArgs``."""
    return CLASSES.get(selector.rpartition(".")[2])


def _no_such_parameter(cls: type[Args], parameter: str, guess: str | None, names: Mapping[str, str]) -> str:
    text = f"{cls.__name__} has no parameter {parameter}"
    if guess:
        return f"{text}; did you mean {guess!r}? (--explain {cls.__name__} lists all)"
    owners = [other for other in REGISTRY if parameter in other.__dataclass_fields__]
    for other in sorted(owners, key=lambda other: parameter not in _missing(other, {})):  # required parameters first
        return f"{text}; did you mean {other.__name__}.{parameter}?"
    return f"{text}; it has {', '.join(names)}"


def _missing(cls: type[Args], bound: Mapping[str, Binding]) -> list[str]:
    return [option.name for option in options_of(cls) if is_required(option) and option.name not in bound]


def _with_outer_scopes(owner: Owner) -> list[Owner]:
    """The owners whose bindings apply to ``owner``, from the empty scope to its own scope."""
    scope, cls = owner
    names = scope.split("/") if scope else []
    return [("/".join(names[:depth]), cls) for depth in range(len(names) + 1)]


def _holds(value: Any, kind: type) -> bool:
    return any(isinstance(leaf, kind) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, dict)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _leaves(element)
    else:
        yield value
