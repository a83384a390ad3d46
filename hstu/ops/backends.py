"""Which kernels run: chosen once, when the model is built, and logged."""

from __future__ import annotations

import logging
from enum import StrEnum

import torch

from hstu.config.errors import ConfigError

logger = logging.getLogger(__name__)


class Backend(StrEnum):
    """Kernel implementations that this version has."""

    PYTORCH = "pytorch"


def select_backend(requested: str, strict: bool, device: torch.device) -> Backend:
    """The backend to use where ``requested`` (cutlass, triton, pytorch) was asked for on ``device``.

    Falls back to pytorch, saying so in one line; with ``strict`` that is a ConfigError instead.
    """
    available = {backend.value for backend in Backend}
    if requested in available:
        return Backend(requested)
    reason = f"kernel_backend {requested!r} is not available in this version (device {device.type})"
    if strict:
        raise ConfigError(
            f"NetworkArgs.{reason}, and strict_kernel_backend = True forbids another: "
            f"use one of {sorted(available)}, or set strict_kernel_backend = False"
        )
    logger.warning("%s; %s is used", reason, Backend.PYTORCH.value)
    return Backend.PYTORCH
