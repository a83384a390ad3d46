"""Compares the installed releases of torch, TorchRec and FBGEMM with those that the tests run with. Imports none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

STACKS = (
    {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu": "1.8"},
    {"torch": "2.12", "torchrec": "1.7", "fbgemm-gpu": "1.7"},
    {"torch": "2.11", "torchrec": "1.6", "fbgemm-gpu": "1.6"},
)
"""The releases that belong together, and that the tests run with, newest first."""


def installed_releases() -> dict[str, str]:
    """The version of each package of STACKS that is installed. FBGEMM's CPU build counts as FBGEMM."""
    versions: dict[str, str] = {}
    for package in STACKS[0]:
        for distribution in (package, f"{package}-cpu"):
            try:
                versions.setdefault(package, metadata.version(distribution))
            except metadata.PackageNotFoundError:
                continue
    return versions


def release_warning(versions: Mapping[str, str]) -> str | None:
    """One line if the packages are not those of one of STACKS; None if they are."""
    if any(all(_release(versions[name]) == _release(stack[name]) for name in versions) for stack in STACKS):
        return None
    tested = ", or ".join(_listed(stack) for stack in STACKS)
    return (
        f"{_listed(versions)} are installed; this trainer is tested with {tested}. To install them: scripts/install.sh"
    )


def stack_of_torch(version: str) -> Mapping[str, str]:
    """The releases that go with a version of torch: of STACKS, or the newest if it is in none."""
    return next((stack for stack in STACKS if _release(stack["torch"]) == _release(version)), STACKS[0])


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _listed(versions: Mapping[str, str]) -> str:
    *most, last = (f"{package} {version}" for package, version in versions.items())
    return f"{', '.join(most)} and {last}" if most else last
