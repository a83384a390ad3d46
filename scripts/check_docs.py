"""Fails where the documentation has drifted from the code. Run by .ci/run and the pre-commit hook.

- docs/configuration.md is what hstu/config/reference.py generates now.
- Every relative link, and every file of ours named in a code span or block, exists.
- Every ``Class.parameter`` of a gin class exists (but in a ```text block, which shows what a program says).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hstu.config import reference
from hstu.config.args import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
# A path below one of our directories, or an entry script; with a suffix, so that "configs/<name>.gin" is no match.
_PATH = re.compile(
    r"(?<![\w/.<>-])((?:(?:hstu|scripts|configs|docs|tests)/[\w./-]+|pretrain_gr_\w+)\.(?:py|sh|gin|md))\b"
)
_OPTION = re.compile(r"\b([A-Z]\w*Args)\.(\w+)")


def documents(root: Path) -> list[Path]:
    """The Markdown files of the repository that people read."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def problems_of(document: Path, root: Path) -> Iterator[str]:
    """One line for each thing that ``document`` names and that does not exist."""
    text = document.read_text(encoding="utf-8")
    name = document.relative_to(root)
    for target in _LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:") and not (document.parent / target).exists():
            yield f"{name}: the link to {target} leads nowhere"
    known = _options()
    for code in _CODE.findall(text):
        for path in _PATH.findall(code):
            if not (root / path).exists():
                yield f"{name}: {path} does not exist"
        if code.startswith("```text"):  # what a program says, perhaps about a mistake
            continue
        for owner, option in _OPTION.findall(code):
            if owner in known and option not in known[owner]:
                yield f"{name}: {owner} has no parameter {option}"


def _options() -> dict[str, set[str]]:
    options: dict[str, set[str]] = {}
    for cls in REGISTRY:
        parameters = cls.__dataclass_fields__.values()
        options[cls.__name__] = {name for p in parameters for name in (p.name, *p.metadata["aliases"])}
    return options


def main() -> int:
    """Print what has drifted; the exit code."""
    page = ROOT / "docs" / "configuration.md"
    text = page.read_text(encoding="utf-8")
    if failed := int(reference.markdown(text) != text):
        print(f"{page} is out of date: python -m hstu.config.reference --write {page}", file=sys.stderr)
    for document in documents(ROOT):
        for problem in problems_of(document, ROOT):
            print(problem, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
