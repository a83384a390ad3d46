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
    CPU = "cpu"
    """C++ for the processor's vector instructions; what the fast backends mean where there is no GPU."""


def select_backend(requested: str, strict: bool, device: torch.device) -> Backend:
    """The backend to use where ``requested`` (cutlass, triton, pytorch) was asked for on ``device``.

    Where that cannot run the next best is taken, and said so in one line; with ``strict`` that is a ConfigError
    instead.
    """
    if requested == Backend.PYTORCH:
        return Backend.PYTORCH
    if device.type == "cpu":
        reason = f"kernel_backend {requested!r} runs on GPUs"
    else:
        reason = f"kernel_backend {requested!r} is not available in this version (device {device.type})"
    if strict:
        raise ConfigError(
            f"NetworkArgs.{reason}, and strict_kernel_backend = True forbids another: "
            "use 'pytorch', or set strict_kernel_backend = False"
        )
    return _on_cpu(reason) if device.type == "cpu" else _fall_back(reason)


def _on_cpu(reason: str) -> Backend:
    from hstu.ops.cpu.build import KernelsUnavailable
    from hstu.ops.cpu.check import check_kernels
    from hstu.ops.cpu.library import keep_freed_memory

    try:
        check_kernels()
        keep_freed_memory()
    except KernelsUnavailable as problem:
        return _fall_back(f"{reason}, and there are no C++ kernels for this CPU: {problem}")
    logger.info("%s; on this CPU the C++ kernels are used", reason)
    return Backend.CPU


def _fall_back(reason: str) -> Backend:
    logger.warning("%s; %s is used", reason, Backend.PYTORCH.value)
    return Backend.PYTORCH
