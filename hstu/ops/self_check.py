"""Shared by the self checks of the backends: no kernel is trusted on a machine before it has been compared there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch

log = logging.getLogger(__name__)


class KernelsDisagree(Exception):
    """A kernel is wrong on this machine: which one, and by how much."""


def gpu_key(sources: Path, device: torch.device, versions: Iterable[str]) -> str:
    """Changes with whatever changes compiled kernels or runs them: their files, the compiler's versions, the device."""
    digest = hashlib.sha256()
    for source in sorted(sources.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    digest.update(repr((*versions, torch.__version__, torch.version.cuda, name, capability)).encode())
    return digest.hexdigest()[:16]


def remember(passed: Path) -> None:
    """Make the file that says that the check has been passed; where that cannot be, say that it will be repeated."""
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError as error:
        log.info("%s cannot be written (%s): the kernels will be checked again", passed, error.strerror)
