"""Gin text → statements with their line. The grammar is that of gin's own parser.

gin's own loader keeps neither lines nor duplicates and stops at the first mistake, so that only its parser is used;
gin_builder.py makes objects of the statements.
"""

from __future__ import annotations

import codecs
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gin import config_parser

from hstu.config.problems import Location, Problem, did_you_mean, literal, show

COMMAND_LINE = "--gin-bindings"


@dataclass(frozen=True)
class Reference:
    """``@scope/Class()`` in a value. ``call`` is False if the parentheses are missing."""

    scope: str
    selector: str
    call: bool

    @property
    def name(self) -> str:
        """``scope/Class``."""
        return f"{self.scope}/{self.selector}" if self.scope else self.selector

    def __repr__(self) -> str:
        return f"@{self.name}{'()' if self.call else ''}"


@dataclass(frozen=True)
class Macro:
    """``%name`` in a value: a macro of the file, or a constant that is registered with gin."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Broken:
    """In place of a value that is wrong and reported."""

    guesses: tuple[Any, ...] = ()
    """The value that was probably meant; empty if that is unclear."""


@dataclass(frozen=True)
class Binding:
    """``scope/selector.parameter = value``; a macro (``name = value``) has no parameter."""

    scope: str
    selector: str
    parameter: str
    value: Any
    at: Location

    @property
    def name(self) -> str:
        """The left side as in the file."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.selector}{f'.{self.parameter}' if self.parameter else ''}"

    def __str__(self) -> str:
        return f"{self.name} = {show(self.value)}"


@dataclass(frozen=True)
class Import:
    """``import module``."""

    module: str
    at: Location


@dataclass
class Scan:
    """All statements of all files and command-line bindings, in the order in which gin would apply them."""

    bindings: list[Binding] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sources: int = 0
    complete: bool = True
    """False: a file cannot be read, so that what seems to be missing may be in it."""
    is_stored: bool = False
    """The text comes from a checkpoint, an export or the directory of a run. It may not run or read anything."""

    def new_source(self, name: str) -> Location:
        """The location of the next file or command-line binding as a whole."""
        self.sources += 1
        return Location(self.sources, 0, name)


def scan(files: Sequence[str], bindings: Sequence[str]) -> Scan:
    """Reads files, the files that they include, and then command-line bindings. ``problems`` holds the mistakes."""
    result = Scan()
    for file in files:
        _scan_file(result, file, included_by=())
    for text in bindings:
        _scan_text(result, text, result.new_source(COMMAND_LINE), included_by=())
    return result


def scan_stored(text: str, name: str) -> Scan:
    """Reads the text of an operative.gin. Statements that would run code or read other files are problems."""
    result = Scan(is_stored=True)
    _scan_text(result, text, result.new_source(name), included_by=())
    return result


def _scan_file(result: Scan, name: str, included_by: tuple[str, ...]) -> None:
    source = result.new_source(name)
    try:
        text = _read(Path(name))
    except ValueError as error:
        result.problems.append(Problem(str(error), source))
        result.complete = False
    else:
        _scan_text(result, text, source, (*included_by, name))


def _read(path: Path) -> str:
    """The text of a gin file. Raises ValueError with what is wrong with the file."""
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise ValueError("this is a directory; give a .gin file") from None
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"no such file{did_you_mean(path.name, siblings)}") from None
    except (OSError, ValueError) as error:  # no permission; a NUL in the name
        raise ValueError(f"cannot be read: {error}") from None
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"not UTF-8 text (line {line}); is this a gin file?") from None
    if "\0" in text:
        raise ValueError("holds NUL bytes; is this a gin file?")
    return text


def _scan_text(result: Scan, text: str, source: Location, included_by: tuple[str, ...]) -> None:
    for statement in _statements(text, source, result.problems):
        match statement:
            case Binding():
                result.bindings.append(statement)
            case Import() | _Include() if result.is_stored:
                kind = "import" if isinstance(statement, Import) else "include"
                result.problems.append(Problem(f"a stored configuration must not {kind} anything", statement.at))
            case Import():
                result.imports.append(statement)
            case _Include(name, at):
                _include(result, name, at, included_by)


def _include(result: Scan, name: str, at: Location, included_by: tuple[str, ...]) -> None:
    """Reads an included file; its path is relative to the working directory, as in gin, or to the including file."""
    beside = str(Path(at.name).parent / name)
    found = next((candidate for candidate in (name, beside) if Path(candidate).is_file()), None)
    if found is None:
        guess = did_you_mean(Path(name).name, [entry.name for entry in sorted(Path(beside).parent.glob("*.gin"))])
        result.problems.append(Problem(f"include {literal(name)}: no such file (nor {beside}){guess}", at))
        result.complete = False
    elif any(Path(found).samefile(parent) for parent in included_by):
        result.problems.append(Problem(f"include {literal(name)}: the file includes itself", at))
    else:
        _scan_file(result, found, included_by)


# --- statements of one text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Include:
    name: str
    at: Location


_Statement = Binding | Import | _Include


class _Delegate(config_parser.ParserDelegate):
    """Makes gin's parser return references and macros as they are written, without evaluating them."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _statements(text: str, source: Location, problems: list[Problem]) -> list[_Statement]:
    """The statements of a text. After a syntax error, each statement is parsed alone to find all errors."""
    try:
        return list(_parse(text, source, first_line=1))
    except _GinSyntaxError as error:
        whole = error.problem
    statements: list[_Statement] = []
    errors: list[Problem] = []
    for first_line, chunk in _chunks(text):
        before = len(statements)
        try:
            statements.extend(_parse(chunk, source, first_line))  # keeps what is read before an error
        except _GinSyntaxError as error:
            errors.append(error.problem)
            if len(statements) == before:
                statements += _broken_binding(chunk, Location(source.source, first_line, source.name))
    problems += errors or [whole]
    return statements


_STATEMENT_START = re.compile(r"[A-Za-z_][\w./]*\s*[=:]|[A-Za-z_]\w*[./][\w./]*\s|(import|from|include)\b")
_BLOCK_START = re.compile(r"([A-Za-z_][\w./]*)\s*:")
_MEMBER_START = re.compile(r"\s+\w+\s*=")


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    """Cuts a text into (number of its first line, statement) where a line can only be the start of a statement.

    A member of a block, ``Class:`` and indented lines below it, becomes a separate statement.
    """
    lines = text.splitlines(keepends=True)
    first, chunk, block = 1, "", ""
    for number, line in enumerate(lines, 1):
        starts, is_member = _STATEMENT_START.match(line), block and _MEMBER_START.match(line)
        if starts or is_member:
            yield first, chunk
            first, chunk = number, ""
        if starts:
            found = _BLOCK_START.match(line)
            block = found[1] if found else ""
            line = line[found.end() :] if found else line
        chunk += f"{block}.{line.lstrip()}" if is_member else line
    yield first, chunk


_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
_UNQUOTED = re.compile(r"[A-Za-z_./~][\w./~-]*")
"""A string without its quotes."""


def _broken_binding(chunk: str, at: Location) -> list[_Statement]:
    """Binds the parameter on the left of an unreadable statement, so that it is not reported as missing too."""
    start = re.match(r"(?:([\w/]+)/)?([\w.]+)\.(\w+)\s*=(.*)", chunk)
    if start is None:
        return []
    value = start[4].partition("#")[0].strip()
    constant = _CONSTANTS.get(value.lower(), value)
    is_clear = _UNQUOTED.fullmatch(value) or value.lower() in _CONSTANTS
    return [Binding(start[1] or "", start[2], start[3], Broken((constant,) if is_clear else ()), at)]


class _GinSyntaxError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def _parse(text: str, source: Location, first_line: int) -> Iterator[_Statement]:
    def locate(line: int) -> Location:
        return Location(source.source, line + first_line - 1, source.name)

    try:
        for statement in config_parser.ConfigParser(text, _Delegate()):
            at = locate(statement.location.line_num)
            if isinstance(statement, config_parser.BindingStatement):
                yield _binding(statement, at)
            elif isinstance(statement, config_parser.ImportStatement):
                yield Import(statement.module, at)
            elif isinstance(statement, config_parser.IncludeStatement):
                yield _Include(statement.filename, at)
    except Exception as error:  # gin's parser raises exceptions of many types, all of which mean a syntax error
        line = _line_of(error, text)
        lines = text.splitlines()
        content = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        shown = f"cannot be read as gin: {literal(content[:100])}{_reason(error, content)}"
        raise _GinSyntaxError(Problem(shown, locate(line))) from None


def _binding(statement: config_parser.BindingStatement, at: Location) -> Binding:
    scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
    if selector in ("macro", "gin.macro") and parameter == "value":  # name/macro.value = 1, the long form of name = 1
        scope, _, selector = scope.rpartition("/")
        parameter = ""
    return Binding(scope, selector, parameter, statement.value, at)


def _line_of(error: Exception, text: str) -> int:
    if isinstance(error, tokenize.TokenError):  # an open bracket or quote, which is in the first statement
        return next((n for n, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"), 1)
    return getattr(error, "lineno", None) or 1


def _reason(error: Exception, content: str) -> str:
    """Why a line is wrong and how to correct it, for people who do not know gin's parser."""
    value = content.partition("=")[2].partition("#")[0].strip()
    if isinstance(error, tokenize.TokenError):
        return "; a bracket or a quote is not closed; close it"
    if "=" in content and not value:
        return "; the value is missing; add it"
    if value.lower() in _CONSTANTS:
        return f"; write {_CONSTANTS[value.lower()]}"
    if _UNQUOTED.fullmatch(value):
        return f"; a string needs quotes: '{value}'"
    if "=" not in content and re.match(r"[\w./]+\s", content):
        return "; expected Class.parameter = value"
    if str(error).startswith("Expected newline"):
        return "; expected one value after the =; gin does not compute"
    reason = (str(error.args[0]) if error.args else type(error).__name__).strip().splitlines()
    return f"; {reason[0].strip().rstrip('.')}" if reason else ""
