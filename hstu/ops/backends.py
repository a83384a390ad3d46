"""Which kernels run: chosen once, when the model is built, and logged."""

from __future__ import annotations

import importlib
import logging
from enum import StrEnum

import torch

from hstu.config.errors import ConfigError
from hstu.ops.cpu import coverage as cpu_coverage
from hstu.ops.cutlass import coverage as cutlass_coverage
from hstu.ops.self_check import KernelsDisagree
from hstu.ops.triton import coverage as triton_coverage

logger = logging.getLogger(__name__)


class Backend(StrEnum):
    """Kernel implementations that this version has."""

    PYTORCH = "pytorch"
    CUTLASS = "cutlass"
    """For attention on NVIDIA GPUs; Triton for the rest."""
    TRITON = "triton"
    """For NVIDIA GPUs."""
    CPU = "cpu"
    """C++ for the processor's vector instructions; what the fast backends mean where there is no GPU."""

    @property
    def uses_triton(self) -> bool:
        """Whether operators that have no kernel of this backend's own run on Triton's."""
        return self in (Backend.CUTLASS, Backend.TRITON)


def select_backend(requested: str, strict: bool, device: torch.device) -> Backend:
    """The backend to use where ``requested`` (cutlass, triton, pytorch) was asked for on ``device``.

    Where that cannot run the next best is taken, and said so in one line; with ``strict`` that is a ConfigError
    instead.
    """
    if requested == Backend.PYTORCH:
        return Backend.PYTORCH
    on_cpu = device.type == "cpu"
    no_triton = f"device {device.type}" if device.type != "cuda" else triton_gap(device)
    no_kernels = no_triton or (_cutlass_gap(device) if requested == Backend.CUTLASS else None)
    if no_kernels is None:
        return Backend(requested)
    if on_cpu:
        reason = f"kernel_backend {requested!r} runs on GPUs"
    else:
        reason = f"kernel_backend {requested!r} cannot run here: {no_kernels}"
    if strict:
        others = "'pytorch'" if no_triton else "'triton' or 'pytorch'"
        raise ConfigError(
            f"NetworkArgs.{reason}, and strict_kernel_backend = True forbids another: "
            f"use {others}, or set strict_kernel_backend = False"
        )
    if no_triton is None:
        logger.warning("%s; %s is used", reason, Backend.TRITON.value)
        return Backend.TRITON
    return _on_cpu(reason) if on_cpu else _fall_back(reason)


def describe_kernels(
    backend: Backend, *, head_dim: int, item_dim: int, dtype: torch.dtype, has_bias: bool = False
) -> str:
    """What serves each operator of a model, for the log: ``operator: backend`` and why, where that is another.

    ``dtype`` is that of the dense model; ``has_bias``: attention has a relative bias.
    """
    if backend is Backend.PYTORCH:
        return f"all operators: {backend.value}"
    if backend.uses_triton:
        gaps, serves = _triton_gaps(head_dim, item_dim, dtype), Backend.TRITON
    else:
        gaps, serves = _cpu_gaps(head_dim, item_dim, dtype), backend
    served = {name: serves.value if gap is None else f"{Backend.PYTORCH.value} ({gap})" for name, gap in gaps.items()}
    if backend is Backend.CUTLASS:
        gap = cutlass_coverage.attention_gap(head_dim, dtype, has_bias=has_bias)
        served["attention"] = backend.value if gap is None else f"{served['attention']} (no {backend.value}: {gap})"
    return ", ".join(f"{name}: {kernels}" for name, kernels in served.items())


def _cpu_gaps(head_dim: int, item_dim: int, dtype: torch.dtype) -> dict[str, str | None]:
    return {
        "attention": cpu_coverage.attention_gap(head_dim, dtype),
        "layer_norm": "no kernel",
        "project_uvqk": "no kernel",
        "norm_mul_dropout": cpu_coverage.type_gap(dtype),
        "sampled_softmax_loss": cpu_coverage.sampled_softmax_gap(item_dim, torch.float32),
        "l2_normalise": None,
        "pool_softmax_loss": "no kernel",
        "jagged_concat": "no kernel",
        "add_positions": "no kernel",
    }


def _triton_gaps(head_dim: int, item_dim: int, dtype: torch.dtype) -> dict[str, str | None]:
    rows, softmax = triton_coverage.type_gap(dtype), triton_coverage.softmax_gap(item_dim, torch.float32)
    return {
        "attention": triton_coverage.attention_gap(head_dim, dtype),
        "layer_norm": rows,
        "project_uvqk": rows,
        "norm_mul_dropout": rows,
        "sampled_softmax_loss": softmax,
        "l2_normalise": "no kernel",
        "pool_softmax_loss": softmax,
        "jagged_concat": rows,
        "add_positions": rows,
    }


def triton_gap(device: torch.device) -> str | None:
    """Why the Triton kernels cannot be used on this GPU; None: they can. The first time a machine they are checked."""
    capability = torch.cuda.get_device_capability(device)
    if capability < triton_coverage.LEAST_CAPABILITY:
        least = ".".join(map(str, triton_coverage.LEAST_CAPABILITY))
        return f"compute capability {'.'.join(map(str, capability))} < {least}"
    return _failed_check("hstu.ops.triton.self_check", "Triton", device)


def _cutlass_gap(device: torch.device) -> str | None:
    """Why the CUTLASS kernels cannot be used on this GPU; None: they can. The first time a machine they are checked."""
    capability = torch.cuda.get_device_capability(device)
    if capability not in cutlass_coverage.CAPABILITIES:
        ours = " and ".join(".".join(map(str, known)) for known in cutlass_coverage.CAPABILITIES)
        return f"compute capability {'.'.join(map(str, capability))}: CUTLASS kernels are for {ours}"
    return _failed_check("hstu.ops.cutlass.self_check", "nvidia-cutlass-dsl", device)


def _failed_check(module: str, package: str, device: torch.device) -> str | None:
    """Why the self check in ``module``, which needs ``package``, does not pass on this GPU; None: it does."""
    try:
        self_check = importlib.import_module(module)
    except ImportError as error:
        return f"{package} does not import ({error})"
    try:
        self_check.check_kernels(device)
    except KernelsDisagree as problem:
        return str(problem)
    return None


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
