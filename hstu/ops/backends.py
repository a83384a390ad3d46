"""Which kernels run: chosen once, when the model is built, and logged."""

from __future__ import annotations

import logging
from enum import StrEnum

import torch

from hstu.config.errors import ConfigError
from hstu.ops.cpu.coverage import attention_gap, gate_gap, sampled_softmax_gap, type_gap

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


def describe_kernels(backend: Backend, *, head_dim: int, item_dim: int, dtype: torch.dtype, split_heads: bool) -> str:
    """What serves each operator of a model, for the log: ``operator: backend`` and why, where that is another.

    ``dtype`` is that of the dense model; ``split_heads``: the heads of a row lie on several ranks.
    """
    gaps: dict[str, str | None] = {
        "attention": attention_gap(head_dim, dtype),
        "split_uvqk": type_gap(dtype),
        "norm_mul_dropout": gate_gap(dtype, split=split_heads),
        "sampled_softmax_loss": sampled_softmax_gap(item_dim, torch.float32),
        "l2_normalise": None,
        "pool_softmax_loss": "no kernel",
        "jagged_concat": "no kernel",
        "add_positions": "no kernel",
    }
    if backend is Backend.PYTORCH:
        return f"all operators: {backend.value}"
    return ", ".join(
        f"{name}: {backend.value}" if gap is None else f"{name}: {Backend.PYTORCH.value} ({gap})"
        for name, gap in gaps.items()
    )


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
