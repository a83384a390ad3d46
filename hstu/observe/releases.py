"""Compares the installed releases of torch, TorchRec and FBGEMM with those that the tests run with. Imports none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

RELEASES = {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu": "1.8"}
"""The releases that belong together, and that the tests run with."""


def installed_releases() -> dict[str, str]:
    """The version of each package of RELEASES that is installed. FBGEMM's CPU build counts as FBGEMM."""
    versions: dict[str, str] = {}
    for package in RELEASES:
        for distribution in (package, f"{package}-cpu"):
            try:
                versions.setdefault(package, metadata.version(distribution))
            except metadata.PackageNotFoundError:
                continue
    return versions


def release_warning(versions: Mapping[str, str]) -> str | None:
    """One line if a package of RELEASES is of another release; None if all are as tested."""
    if all(_release(version) == _release(RELEASES[package]) for package, version in versions.items()):
        return None
    return (
        f"{_listed(versions)} are installed; this trainer is tested with {_listed(RELEASES)}, which scripts/install.sh "
        "installs"
    )


def pipeline_unsupported_reason(pipeline_type: str, versions: Mapping[str, str]) -> str | None:
    """Why the installed TorchRec cannot run TrainerArgs.pipeline_type; None: it can.

    TorchRec 1.6.1 keeps the batches of its prefetching pipeline in other attributes than TorchRec 1.8.
    """
    version, least = versions.get("torchrec"), RELEASES["torchrec"]
    if pipeline_type != "prefetch" or version is None or _release(version) >= _release(least):
        return None
    return f'needs torchrec {least} or newer, and torchrec {version} is installed; use "native", or scripts/install.sh'


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _listed(versions: Mapping[str, str]) -> str:
    *most, last = (f"{package} {version}" for package, version in versions.items())
    return f"{', '.join(most)} and {last}" if most else last
