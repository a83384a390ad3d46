"""Setup before the import of torch: compatible package versions, and how idle threads wait."""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata, util

from hstu.base.errors import UserError

STACKS: Sequence[Mapping[str, str]] = (
    {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu": "1.8"},
    {"torch": "2.12", "torchrec": "1.7", "fbgemm-gpu": "1.7"},
    {"torch": "2.11", "torchrec": "1.6", "fbgemm-gpu": "1.6"},
)
"""Compatible releases that the tests run with, newest first."""


def missing_packages(modules: Sequence[str]) -> list[str]:
    """Return the ``modules`` that are not installed. Imports none of them."""
    return [module for module in modules if util.find_spec(module) is None]


def check_packages() -> None:
    """Raise UserError if torch, TorchRec or FBGEMM is missing; warn once per run if their releases are untested.

    Imports none of them. Silences FBGEMM's own check: FBGEMM 1.6.0 warns 50 times that its own table lacks it.
    """
    logging.getLogger().addFilter(lambda record: "_fbgemm_torch_compat_table" not in str(record.msg))
    versions = installed_releases()
    tested = ", or ".join(_listed(stack) for stack in STACKS)
    remedy = f"scripts/install.sh installs releases that belong together: {tested}"
    if missing := [package for package in STACKS[0] if package not in versions]:
        if missing == ["torchrec"]:  # as after pip install 'hstu-trainer[cpu]'
            release = "{}.{}".format(*_release(versions["fbgemm-gpu"]))
            remedy = f"pip install --no-deps 'torchrec=={release}.*' brings the one that belongs to FBGEMM {release}"
        raise UserError(f"missing packages: {', '.join(missing)}. {remedy}")
    is_tested = any(all(_release(versions[name]) == _release(stack[name]) for name in stack) for stack in STACKS)
    if not is_tested and os.environ.get("RANK", "0") == "0":
        print(f"warning: untested releases: {_listed(versions)}. {remedy}", file=sys.stderr, flush=True)


def installed_releases() -> dict[str, str]:
    """Installed version of each package of STACKS. FBGEMM's CPU build counts as FBGEMM."""
    versions: dict[str, str] = {}
    for package in STACKS[0]:
        for distribution in (package, f"{package}-cpu"):
            with suppress(metadata.PackageNotFoundError):
                versions.setdefault(package, metadata.version(distribution))
    return versions


def let_idle_threads_sleep() -> None:
    """Let waiting OpenMP threads sleep instead of spin, unless the user has configured this.

    Call it before anything imports torch, because OpenMP reads its environment once. On a busy machine, a spinning
    thread takes the core from the thread that it waits for (docs/benchmarks/items_cpu/README.md).
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _listed(versions: Mapping[str, str]) -> str:
    *most, last = (f"{package} {version}" for package, version in versions.items())
    return f"{', '.join(most)} and {last}" if most else last
