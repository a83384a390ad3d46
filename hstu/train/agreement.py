"""Facts that must be equal on all ranks, as name → value: the configuration and the code."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import hstu
from hstu.checkpoint.state import versions
from hstu.config.gin_scan import scan
from hstu.config.problems import literal
from hstu.config.run_config import RunConfig

_PLACES_OF_THE_DATA = re.compile(r"DatasetArgs\.(eval_)?dataset_path")


def run_facts(config: RunConfig) -> dict[str, str]:
    """Configuration and code version of this rank, without dataset paths, which may differ between hosts."""
    bindings = scan([], [config.operative_gin()]).bindings
    facts = {each.name: literal(each.value) for each in bindings if not _PLACES_OF_THE_DATA.fullmatch(each.name)}
    packages = {f"version of {name}": version for name, version in versions().items() if name != "python"}
    return {"task": config.task, **facts, **packages, "SHA-256 of the code in hstu": source_digest()}


def source_digest(root: Path = Path(hstu.__file__).parent) -> str:
    """SHA-256 of all source files of the package."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h") and path.is_file():
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
