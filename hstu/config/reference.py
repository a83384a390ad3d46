"""Generates the reference of all parameters from hstu/config/args, for ``--explain`` and docs/configuration.md, whose
tables ``python -m hstu.config.reference --write docs/configuration.md`` writes."""

import argparse
import ast
import functools
import inspect
import textwrap
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NamedTuple

from hstu.base.errors import ConfigError
from hstu.config.args import CLASSES, REGISTRY, Args
from hstu.config.option import default_of, describe_limits, is_required, options_of
from hstu.config.problems import did_you_mean, literal

MARKER = "<!-- Made from hstu/config/args by: python -m hstu.config.reference --write docs/configuration.md -->"


class Parameter(NamedTuple):
    """A row of the reference. ``default`` is in gin syntax or "required"; ``allowed`` has limits beyond the type."""

    name: str
    type: str
    default: str
    allowed: str
    changes: str
    meaning: str


def parameters_of(cls: type[Args]) -> list[Parameter]:
    """The parameters of a class in order, inherited ones included."""
    docs = ChainMap(*map(_field_docs, cls.__mro__))
    return [
        Parameter(
            field.name,
            str(field.type),
            "required" if is_required(field) else literal(default_of(field)),
            describe_limits(field),
            field.metadata["changes"],
            f"{docs[field.name]} {_needs(field)}".rstrip(),
        )
        for field in options_of(cls)
    ]


def _needs(field: Field[Any]) -> str:
    """Sentences about the needs and exclusions of an option; empty if it has none."""
    needed, excluded = " and ".join(map(str, field.metadata["needs"])), " and ".join(field.metadata["excludes"])
    return " ".join([f"Needs {needed}."] * bool(needed) + [f"Excludes {excluded}."] * bool(excluded))


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Field → its docstring: the string literal under it in the source."""
    if not issubclass(cls, Args) or cls is Args:
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            docs[statement.target.id] = " ".join(str(text).split())
    return docs


def explain(names: Sequence[str] = ()) -> str:
    """The reference of the named classes (default: all) as text. Raises ConfigError for unknown names."""
    if unknown := [name for name in names if name not in CLASSES]:
        every = ", ".join(CLASSES)
        text = "--explain {}: there is no such class{}; choose one of {}"
        raise ConfigError([text.format(name, did_you_mean(name, CLASSES), every) for name in unknown])
    return "\n\n".join(_as_text(CLASSES[name]) for name in names or CLASSES)


def _as_text(cls: type[Args]) -> str:
    lines = [f"{cls.__name__}: {' '.join((cls.__doc__ or '').split())}"]
    for p in parameters_of(cls):
        head = f"  {p.name}: {p.type}" + (" (required)" if p.default == "required" else f" = {p.default}")
        lines.append(head + (f"   [{p.allowed}]" if p.allowed else ""))
        text = f"{p.meaning} Changes {p.changes}."
        lines.append(textwrap.fill(text, width=110, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def markdown(page: str) -> str:
    """docs/configuration.md: ``page`` up to the marker, then one table per class."""
    introduction, _, _ = page.partition(MARKER)
    return "\n".join([f"{introduction}{MARKER}", "", *(_as_markdown(cls) for cls in REGISTRY)])


def _as_markdown(cls: type[Args]) -> str:
    rows = ["| parameter | type | default | allowed | changes | meaning |", "|---|---|---|---|---|---|"]
    for p in parameters_of(cls):
        default = p.default if p.default == "required" else f"`{p.default}`"
        cells = [f"`{p.name}`", f"`{p.type}`", default, p.allowed, p.changes, p.meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([f"### {cls.__name__}", "", " ".join((cls.__doc__ or "").split()), "", *rows, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description="Make docs/configuration.md from the argument classes.")
    parser.add_argument("--write", type=Path, metavar="FILE", required=True)
    path: Path = parser.parse_args(argv).write
    path.write_text(markdown(path.read_text(encoding="utf-8") if path.is_file() else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
