"""Launch kernels: in the first configuration that fits the device, in the interpreter, or only recorded.

All host functions of this package launch their kernels through :func:`launcher`, so that ``compile_ahead.py`` records
exactly what they would run. There is no autotuning: the configuration does not depend on lengths or times, so that all
ranks run the same one and runs repeat bit for bit. ``scripts/bench/configurations.py`` finds the fastest.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from hstu.ops.triton.primitives import Precision

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, and its configurations in order of preference."""

    kernel: Any
    arguments: Mapping[str, Any]
    configs: Sequence[triton.Config]
    grid: Grid


_recording: tuple[tuple[int, int], list[Launch]] | None = None
"""Launches recorded as if on a GPU of this compute capability."""


@contextmanager
def recorded_launches(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Record launches as if on such a GPU instead of running them; outputs are undefined."""
    global _recording
    previous, launches = _recording, list[Launch]()
    _recording = capability, launches
    try:
        yield launches
    finally:
        _recording = previous


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton interprets the kernel on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""
    return isinstance(kernel, InterpretedFunction)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability for which configurations are chosen; on a CPU, the capability of an H100."""
    if _recording is not None:
        return _recording[0]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def precision_for(kernel: Any, dtype: torch.dtype, exact: bool = False) -> Precision:
    """Products of float32 take three TF32 products, about as exact. ``exact``: plain arithmetic, fewer registers."""
    interpreted = is_interpreted(kernel)
    return Precision(
        products=("ieee" if exact else "tf32x3") if dtype == torch.float32 else "tf32",
        upcast=interpreted and dtype == torch.bfloat16,
        fast_sigmoid=dtype.itemsize == 2 and not interpreted,
    )


def launcher(kernel: Any, grid: Grid, configs: Sequence[triton.Config]) -> Callable[..., object]:
    """A callable that runs ``kernel`` in the first of ``configs`` that fits the device, or in the interpreter."""
    if is_interpreted(kernel) and _recording is None:
        return partial(kernel[grid], **configs[0].kwargs)
    _hash_functions(kernel.__module__)
    if _recording is not None:
        launches = _recording[1]
        return lambda **arguments: launches.append(Launch(kernel, arguments, configs, grid))
    return partial(_launch_first, kernel, grid, configs)


def row_launcher(kernel: Any, programs: int, width: int) -> Callable[..., object]:
    """Launcher of a kernel that processes row by row: at least 16 columns per thread, at most 16 warps."""
    block = max(16, triton.next_power_of_2(width))
    config = triton.Config({}, num_warps=min(16, max(1, block // 512)), num_stages=1)
    return partial(launcher(kernel, lambda _: (programs,), [config]), WIDTH=width, BLOCK=block)


@functools.cache
def _hash_functions(module: str) -> None:
    """Compute the hashes of a module's functions in the order of their definition, after the hashes of its imports.

    The hash is part of Triton's cache key. Triton 3.6 omits the constants of a called function that has no hash yet, so
    another order would give keys that the cache does not have.
    """
    for function in list(vars(sys.modules[module]).values()):
        if isinstance(function, triton.JITFunction):
            if function.__module__ != module:
                _hash_functions(function.__module__)
            _ = function.cache_key


def _launch_first(kernel: Any, grid: Grid, configs: Sequence[triton.Config], /, **arguments: Any) -> None:
    for config in configs:
        try:
            kernel[grid](**arguments, **config.all_kwargs(), enable_fp_fusion=True)
            return
        except OutOfResources as error:
            refused = error
    raise refused
