"""Hook of MkDocs (mkdocs.yml): brings the files of the repository that the pages link to into the documentation site.

README.md becomes the start page. Other files outside docs/ become pages below source/: Markdown as it is, code as a
block, a directory as a list of its files. Links to them are rewritten while a page is built; nothing is stored twice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(\[[^\]]*\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_GIN = re.compile(r"^```gin\b.*$", re.MULTILINE)
_LANGUAGES = {".py": "python", ".sh": "bash", ".gin": "python"}
_linked: dict[str, Path] = {}
"""Address in the site, such as source/configs/ml_1m_retrieval.gin.md, to the file or directory."""


def _address(path: Path) -> str:
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    if path == ROOT / "README.md":
        return "index.md"
    return f"source/{path.relative_to(ROOT)}{'' if path.suffix == '.md' else '.md'}"


def _text(path: Path) -> str:
    """The Markdown of a file or directory outside docs/."""
    if path.is_dir():
        files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        return f"# {path.name}\n\n" + "".join(f"- [{file}]({path.name}/{file})\n" for file in files)
    text = path.read_text(encoding="utf-8")
    return (
        text if path.suffix == ".md" else f"# {path.name}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
    )


def _targets(text: str, folder: Path) -> list[tuple[re.Match[str], Path]]:
    """The links of a page to files of the repository."""
    found = [(link, Path(os.path.normpath(folder / link[2]))) for link in _LINK.finditer(text)]
    return [(link, path) for link, path in found if path.is_relative_to(ROOT) and path.exists()]


def on_files(files: Any, config: Any) -> Any:
    """Adds README.md and everything outside docs/ that a page links to, from page to page."""
    new = [ROOT / "README.md"]
    while new:
        for path in new:
            address = _address(path)
            _linked[address] = path
            files.append(File.generated(config, address, content=_text(path)))
        pages = [(page, page.read_text(encoding="utf-8")) for page in DOCS.rglob("*.md")]
        pages += [(path, _text(path)) for path in _linked.values() if path.suffix == ".md" or path.is_dir()]
        linked = {path for page, text in pages for _, path in _targets(text, page.parent)}
        new = sorted(path for path in linked if not path.is_relative_to(DOCS) and _address(path) not in _linked)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page to the addresses of the site. Gin files are highlighted as Python is."""
    address = page.file.src_uri
    folder = _linked.get(address, DOCS / address).parent
    for link, path in reversed(_targets(markdown, folder)):
        target = os.path.relpath(_address(path), os.path.dirname(address) or ".")
        markdown = f"{markdown[: link.start()]}{link[1]}{target}{link[3]}{markdown[link.end() :]}"
    return _GIN.sub("```python", markdown)
