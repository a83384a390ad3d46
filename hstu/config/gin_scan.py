"""Reads gin text into bindings with line numbers. A gin file must not import modules or call functions.

Uses gin's parser but not its loader, which drops line numbers and duplicates and stops at the first mistake.
"""

import codecs
import difflib
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gin import config_parser

from hstu.base.shipped import shipped_configs
from hstu.config.problems import Binding, Location, Problem, did_you_mean, literal

COMMAND_LINE = "--gin-bindings"


@dataclass(frozen=True)
class Reference:
    """``@scope/Class()`` in a value. Without parentheses, ``call`` is False."""

    scope: str
    selector: str
    call: bool

    def __repr__(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return f"@{scope}{self.selector}{'()' if self.call else ''}"


@dataclass(frozen=True)
class Macro:
    """``%name`` in a value."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


class Broken:
    """Replaces a wrong value that is already reported."""


@dataclass
class Scan:
    """All bindings of files and command line, in the order in which gin applies them."""

    bindings: list[Binding] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sources: int = 0
    complete: bool = True
    """False if a file is unreadable: it may contain bindings that seem to be missing."""

    def new_source(self, name: str) -> Location:
        """The location of the next file or command-line binding, without a line."""
        self.sources += 1
        return Location(self.sources, 0, name)


def scan(files: Sequence[str], bindings: Sequence[str]) -> Scan:
    """Reads files with their includes, then command-line bindings. ``Scan.problems`` holds the mistakes."""
    result = Scan()
    for file in files:
        _scan_file(result, file, included_by=())
    for text in bindings:
        _scan_text(result, text, result.new_source(COMMAND_LINE), included_by=())
    return result


def scan_stored(text: str, name: str) -> Scan:
    """Reads the text of an operative.gin, which must not include other files."""
    result = Scan()
    _scan_text(result, text, result.new_source(name), included_by=None)
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
    """The text of a gin file. Raises ValueError if the file is unusable."""
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = ", ".join(difflib.get_close_matches(path.stem, shipped_configs(), n=5))
        shipped = f" (shipped files with similar names: {near})" if near else ""
        raise ValueError(f"no such file{did_you_mean(path.name, siblings)}{shipped}") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}; give a .gin file") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; is this a gin file?") from None
    if "\0" in text:
        raise ValueError("holds NUL bytes; is this a gin file?")
    return text


def _scan_text(result: Scan, text: str, source: Location, included_by: tuple[str, ...] | None) -> None:
    """``included_by``: the chain of including files, or None if include statements are mistakes."""
    for statement in _statements(text, source, result.problems):
        if isinstance(statement, Binding):
            result.bindings.append(statement)
        elif included_by is None:
            result.problems.append(Problem("a stored configuration must not include anything", statement[1]))
        else:
            _include(result, *statement, included_by)


def _include(result: Scan, name: str, at: Location, included_by: tuple[str, ...]) -> None:
    """Reads an included file: a path relative to the working directory, as in gin, or to the including file, or the
    name of a shipped file."""
    beside = Path(at.name).parent / name
    shipped = Path(shipped_configs().get(name.removesuffix(".gin"), ""))
    found = next((path for path in (Path(name), beside, shipped) if path.is_file()), None)
    statement = f"include {literal(name)}"
    if found is None:
        guess = did_you_mean(beside.name, [entry.name for entry in sorted(beside.parent.glob("*.gin"))])
        result.problems.append(Problem(f"{statement}: no such file (nor {beside}){guess}", at))
        result.complete = False
    elif any(found.samefile(parent) for parent in included_by):
        result.problems.append(Problem(f"{statement}: the file includes itself", at))
    else:
        _scan_file(result, str(found), included_by)


# --- statements of one text ---------------------------------------------------------------------------------------


Include = tuple[str, Location]
"""The name in an include statement, and where it stands."""


class _Delegate(config_parser.ParserDelegate):
    """Makes gin's parser return references and macros unevaluated."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _statements(text: str, source: Location, problems: list[Problem]) -> list[Binding | Include]:
    """The statements of a text. After a syntax error, parses each statement alone to find all errors."""
    of_whole: list[Problem] = []
    statements = list(_parse(text, source, 1, of_whole))
    if not of_whole:
        return statements
    statements, errors = [], []
    for first_line, chunk in _chunks(text):
        found: list[Problem] = []
        statements += _parse(chunk, source, first_line, found)
        if found and (start := re.match(r"(?:([\w/]+)/)?([\w.]+)\.(\w+)\s*=", chunk)):  # or it is reported as missing
            at = replace(source, line=first_line)
            statements.append(Binding(start[1] or "", start[2], start[3], Broken(), at))
        errors += found
    problems += errors or of_whole
    return statements


_STATEMENT_START = re.compile(r"[A-Za-z_][\w./]*\s*[=:]|[A-Za-z_]\w*[./][\w./]*\s|(import|from|include)\b")


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    """Splits a text into (first line number, text), before each line that must be the start of a statement."""
    first, chunk = 1, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if _STATEMENT_START.match(line):
            yield first, chunk
            first, chunk = number, ""
        chunk += line
    yield first, chunk


def _parse(text: str, source: Location, first_line: int, errors: list[Problem]) -> Iterator[Binding | Include]:
    """The statements before the first error, which is added to ``errors``."""
    try:
        for statement in config_parser.ConfigParser(text, _Delegate()):
            at = replace(source, line=first_line + statement.location.line_num - 1)
            if isinstance(statement, config_parser.BindingStatement):
                yield Binding(statement.scope, statement.selector, statement.arg_name, statement.value, at)
            elif isinstance(statement, config_parser.IncludeStatement):
                yield statement.filename, at
            elif isinstance(statement, config_parser.ImportStatement):
                reason = "a gin file is data and imports nothing; remove the line"
                errors.append(Problem(f"import {statement.module}: {reason}", at))
                return
    except Exception as error:  # gin's parser reports syntax errors by many exception types
        line, lines = getattr(error, "lineno", None) or 1, text.splitlines()
        if isinstance(error, tokenize.TokenError):  # an unclosed bracket or quote of the first statement
            line = next((n for n, line in enumerate(lines, 1) if line.strip() and line[0] != "#"), 1)
        content = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        shown = f"cannot be read as gin: {literal(content[:100])}; {_reason(error, content)}"
        errors.append(Problem(shown, replace(source, line=first_line + line - 1)))


def _reason(error: Exception, content: str) -> str:
    """Why a line is wrong and how to correct it, without terms of gin's parser."""
    value = content.partition("=")[2].partition("#")[0].strip()
    if isinstance(error, tokenize.TokenError):
        return "a bracket or a quote is not closed; close it"
    if value.lower() in ("true", "false", "none"):
        return f"write {value.capitalize()}"
    if re.fullmatch(r"[A-Za-z_./~][\w./~-]*", value):
        return f"a string needs quotes: '{value}'"
    return "expected Class.parameter = value, with one value: gin does not compute"
