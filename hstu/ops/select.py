"""Select the kernels of a model. Backends are imported on demand: Triton, CUTLASS or a C++ compiler may be missing."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType

import torch

from hstu.base.errors import ConfigError
from hstu.ops.check_process import refusals, refusals_on_cpu
from hstu.ops.kernels import OPERATORS, SLOTS, Backend, Kernels, KernelShapes, ServedBy
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.support import device_unsupported_reason, unsupported_reason

logger = logging.getLogger(__name__)

FALLBACKS = {
    Backend.PYTORCH: (),
    Backend.CPU: (Backend.CPU,),
    Backend.TRITON: (Backend.TRITON,),
    Backend.CUTLASS: (Backend.CUTLASS, Backend.TRITON),
}
"""Backends to try for an operator, in order of preference; PyTorch is always the last."""


def select_kernels(requested: str, strict: bool, device: torch.device, shapes: KernelShapes) -> Kernels:
    """Select the kernels of a model on ``device``. Compares them with PyTorch at their first use on a machine.

    Raises ConfigError if ``strict`` and the requested backend cannot run or one of its kernels is refused.
    """
    backend = Backend(requested)
    if device.type == "cpu" and backend is not Backend.PYTORCH:
        backend = Backend.CPU
        if strict:
            raise ConfigError(
                f"NetworkArgs.kernel_backend {requested!r} runs on GPUs, and strict_kernel_backend = True forbids "
                "another: use 'pytorch', or set strict_kernel_backend = False"
            )
        logger.info("kernel_backend %r runs on GPUs; this CPU uses C++ kernels", requested)
    kernels = resolve_kernels(backend, shapes, partial(_refusals, device))
    refused = {operator: served for operator, served in kernels.served_by.items() if served.is_refused}
    if strict and refused:
        raise ConfigError(
            [
                f"NetworkArgs.kernel_backend {requested!r} cannot serve the operators below here, and "
                "strict_kernel_backend = True forbids others: use 'pytorch', or set strict_kernel_backend = False",
                *(f"  kernel {operator}: {served}" for operator, served in refused.items()),
            ]
        )
    return kernels


def resolve_kernels(
    backend: Backend,
    shapes: KernelShapes,
    check: Callable[[Backend, KernelShapes, Sequence[str]], Mapping[str, str]] = lambda *_: {},
) -> Kernels:
    """Kernels of ``backend``, or of the next best backend for each operator that it lacks or that ``check`` refuses."""
    kernels = {operator: getattr(REFERENCE_KERNELS, operator) for operator in OPERATORS}
    served_by: dict[str, ServedBy] = {}
    reasons: dict[str, list[str]] = {operator: [] for operator in OPERATORS}
    refused: set[str] = set()
    for candidate in FALLBACKS[backend]:
        waiting = [operator for operator in OPERATORS if operator not in served_by]
        missing = {operator: unsupported_reason(candidate, operator, shapes) for operator in waiting}
        failed = check(candidate, shapes, [operator for operator in waiting if missing[operator] is None])
        refused.update(failed)
        for operator in waiting:
            if reason := missing[operator] or failed.get(operator):
                reasons[operator].append(f"{candidate.value}: {reason}")
            else:
                kernels[operator] = importlib.import_module(f"hstu.ops.{candidate}.operators").OPERATORS[operator]
                served_by[operator] = ServedBy(candidate, "; ".join(reasons[operator]) or None, operator in refused)
    for operator in OPERATORS:
        reason = "; ".join(reasons[operator]) or None
        served_by.setdefault(operator, ServedBy(Backend.PYTORCH, reason, operator in refused))
    return Kernels(**kernels, served_by={operator: served_by[operator] for operator in OPERATORS})


def select_slot_kernels(device: torch.device) -> tuple[ModuleType | None, str | None]:
    """The module of the kernels of dynamic tables, or None and why they cannot be used on this GPU."""
    reason = _refusals(device, Backend.TRITON, None, [SLOTS]).get(SLOTS)
    return (None, reason) if reason else (importlib.import_module("hstu.ops.triton.slots"), None)


def _refusals(
    device: torch.device, backend: Backend, shapes: KernelShapes | None, operators: Sequence[str]
) -> Mapping[str, str]:
    """Operator → why its kernel cannot be used on the device. Compares with PyTorch at the first use on a machine."""
    if not operators:
        return {}
    if backend is Backend.CPU:
        return refusals_on_cpu(operators)
    reason = device_unsupported_reason(backend, torch.cuda.get_device_capability(device))
    return refusals(backend, device, shapes, operators) if reason is None else dict.fromkeys(operators, reason)
