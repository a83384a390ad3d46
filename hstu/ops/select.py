"""Which kernels a model runs on: resolved once, when it is built, into a :class:`hstu.ops.kernels.Kernels`.

Imports backends inside functions: a machine needs neither Triton, nor CUTLASS, nor a C++ compiler
for the backends that it does not use.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hstu.config.errors import ConfigError
from hstu.ops.check_process import Checked, refusal
from hstu.ops.kernels import OPERATORS, Backend, Kernels, KernelShapes, ServedBy
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

logger = logging.getLogger(__name__)

FALLBACKS = {
    Backend.PYTORCH: (),
    Backend.CPU: (Backend.CPU,),
    Backend.TRITON: (Backend.TRITON,),
    Backend.CUTLASS: (Backend.CUTLASS, Backend.TRITON),
}
"""Backends that serve an operator, in order of preference; PyTorch is the last resort of all."""


def select_kernels(requested: str, strict: bool, device: torch.device, shapes: KernelShapes) -> Kernels:
    """The kernels for a model on ``device`` where NetworkArgs.kernel_backend = ``requested``.

    Compares kernels with PyTorch at their first use on a machine. Logs one line where another backend is chosen.

    Raises:
        ConfigError: ``strict`` and the requested backend cannot run.
    """
    return resolve_kernels(select_backend(requested, strict, device, shapes), shapes)


def resolve_kernels(backend: Backend, shapes: KernelShapes) -> Kernels:
    """The kernels of ``backend``, and for each operator that it lacks the next best."""
    resolved: dict[str, Any] = {}
    served_by = {}
    for operator in OPERATORS:
        resolved[operator], served_by[operator] = _resolve(operator, backend, shapes)
    return Kernels(**resolved, served_by=served_by)


def _resolve(operator: str, backend: Backend, shapes: KernelShapes) -> tuple[Any, ServedBy]:
    reasons: list[str] = []
    for candidate in FALLBACKS[backend]:
        module = _backend_module(candidate)
        if operator not in module.OPERATORS:
            if candidate is not Backend.CUTLASS:  # which is for attention alone
                reasons.append("no kernel")
            continue
        reason = module.unsupported_reason(operator, shapes)
        if reason is None:
            return module.OPERATORS[operator], ServedBy(candidate, "; ".join(reasons) or None)
        reasons.append(f"no {candidate.value}: {reason}" if candidate is Backend.CUTLASS else reason)
    return getattr(REFERENCE_KERNELS, operator), ServedBy(Backend.PYTORCH, "; ".join(reversed(reasons)) or None)


def _backend_module(backend: Backend) -> ModuleType:
    return importlib.import_module(f"hstu.ops.{backend.value}.operators")


def select_backend(requested: str, strict: bool, device: torch.device, shapes: KernelShapes) -> Backend:
    """The backend that can run ``shapes`` on ``device`` where ``requested`` (cutlass, triton, pytorch) was asked for.

    If it is not the requested one, one line is logged; with ``strict`` a ConfigError is raised instead.
    """
    if requested == Backend.PYTORCH:
        return Backend.PYTORCH
    on_cpu = device.type == "cpu"
    no_triton = f"device {device.type}" if device.type != "cuda" else triton_unsupported_reason(device, shapes)
    unsupported = no_triton or (cutlass_unsupported_reason(device, shapes) if requested == Backend.CUTLASS else None)
    if unsupported is None:
        return Backend(requested)
    if on_cpu:
        reason = f"kernel_backend {requested!r} runs on GPUs"
    else:
        reason = f"kernel_backend {requested!r} cannot run here: {unsupported}"
    if strict:
        others = "'pytorch'" if no_triton else "'triton' or 'pytorch'"
        raise ConfigError(
            f"NetworkArgs.{reason}, and strict_kernel_backend = True forbids another: "
            f"use {others}, or set strict_kernel_backend = False"
        )
    if no_triton is None:
        logger.warning("%s; %s is used", reason, Backend.TRITON.value)
        return Backend.TRITON
    return _cpu_or_pytorch(reason) if on_cpu else _pytorch(reason)


def triton_unsupported_reason(device: torch.device, shapes: KernelShapes | None) -> str | None:
    """Why the Triton kernels cannot run on this GPU; None: they can. Checks them at their first use on a machine.

    ``shapes``: of the model; None: only the kernels of dynamic tables are wanted.
    """
    return _gpu_unsupported_reason("triton", "Triton", "triton", device, shapes)


def select_slot_kernels(device: torch.device) -> tuple[ModuleType | None, str | None]:
    """The kernels of dynamic tables, hstu.ops.triton.slots; else (None, why Triton cannot run on this GPU)."""
    unsupported_reason = triton_unsupported_reason(device, None)
    if unsupported_reason is not None:
        return None, unsupported_reason
    return importlib.import_module("hstu.ops.triton.slots"), None


def cutlass_unsupported_reason(device: torch.device, shapes: KernelShapes) -> str | None:
    """Why the CUTLASS kernels cannot run on this GPU; None: they can. Checks them at their first use on a machine."""
    return _gpu_unsupported_reason("cutlass", "CUTLASS", "nvidia-cutlass-dsl", device, shapes)


def _gpu_unsupported_reason(
    backend: str, name: str, package: str, device: torch.device, shapes: KernelShapes | None
) -> str | None:
    support = importlib.import_module(f"hstu.ops.{backend}.support")
    reason: str | None = support.device_unsupported_reason(torch.cuda.get_device_capability(device))
    checked = Checked(name, package, f"hstu.ops.{backend}.self_check", Path(__file__).parent / backend)
    return reason or refusal(checked, device, shapes)


def _cpu_or_pytorch(reason: str) -> Backend:
    from hstu.ops.cpu.build import KernelsUnavailable, keep_freed_memory
    from hstu.ops.cpu.self_check import check_kernels

    try:
        check_kernels()
        keep_freed_memory()
    except KernelsUnavailable as problem:
        return _pytorch(f"{reason}, and there are no C++ kernels for this CPU: {problem}")
    logger.info("%s; on this CPU the C++ kernels are used", reason)
    return Backend.CPU


def _pytorch(reason: str) -> Backend:
    logger.warning("%s; %s is used", reason, Backend.PYTORCH.value)
    return Backend.PYTORCH
