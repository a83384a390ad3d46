"""A document of headings, paragraphs, tables and images, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu.base.printable import printable

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em } img { max-width: 100% } code { overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }"""


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 1 is the title of the document."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A sentence, followed by ``code``, if any."""

    text: str
    code: str = ""


@dataclass(frozen=True)
class Table:
    """A table. Numbers get thousands separators; floats are rounded to two places."""

    header: Sequence[str]
    rows: Iterable[Sequence[object]]


@dataclass(frozen=True)
class Image:
    """An image in the folder of the document."""

    file: str
    description: str


Part = Heading | Paragraph | Table | Image


def to_markdown(parts: Iterable[Part]) -> str:
    """The document as Markdown, which refers to its images."""
    return "\n".join(map(_markdown, parts))


def to_html(parts: Sequence[Part], folder: Path) -> str:
    """The document as one HTML file, which contains its images from ``folder``."""
    title = next((part.text for part in parts if isinstance(part, Heading)), "")
    body = "\n".join(_html(part, folder) for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{_escaped(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {_markdown_text(part.text)}\n"
    if isinstance(part, Paragraph):
        code = f"{printable(part.code, keep='')}".replace("`", "'")
        return _markdown_text(part.text) + (f" `{code}`" if code else "") + "\n"
    if isinstance(part, Image):
        return f"![{part.description}]({part.file})\n"
    cells = [part.header, ["---"] * len(part.header), *part.rows]
    lines = [[_markdown_text(_cell(value)) for value in row] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _html(part: Part, folder: Path) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{_escaped(part.text)}</h{part.level}>"
    if isinstance(part, Paragraph):
        return f"<p>{_escaped(part.text)}" + (f" <code>{_escaped(part.code)}</code>" if part.code else "") + "</p>"
    if isinstance(part, Image):
        png = base64.b64encode((folder / part.file).read_bytes()).decode()
        return f'<p><img alt="{_escaped(part.description)}" src="data:image/png;base64,{png}"></p>'
    header = "".join(f"<th>{_escaped(name)}</th>" for name in part.header)
    rows = ("".join(_html_cell(value) for value in row) for row in part.rows)
    return "\n".join([f"<table><tr>{header}</tr>", *(f"<tr>{row}</tr>" for row in rows), "</table>"])


def _html_cell(value: object) -> str:
    kind = ' class="number"' if isinstance(value, int | float) else ""
    return f"<td{kind}>{_escaped(_cell(value))}</td>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(text: str) -> str:
    return html.escape(printable(text, keep=""))


def _markdown_text(text: str) -> str:
    """Raw data as it is, not as markup."""
    return re.sub(r"[|`*\[\]\\]", r"\\\g<0>", html.escape(printable(text, keep=""), quote=False))
