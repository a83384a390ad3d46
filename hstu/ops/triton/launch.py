"""Launches kernels: in the fastest or the first configuration, in the interpreter, or only recorded.

All host functions of this package launch their kernels through :func:`launcher`. Compiling ahead of time
(``compile_ahead.py``) therefore records exactly what a host function would run, and compiles it for another GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from hstu.ops.triton.primitives import Precision

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]

_tuners: dict[Hashable, Any] = {}


@dataclass
class _Fixed:
    """The configuration that :func:`each_configuration` prescribes."""

    number: int
    most: int = 1
    """Configurations of the launched kernel that has the most."""


_fixed: _Fixed | None = None


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, and the configurations to choose from."""

    kernel: Any
    arguments: Mapping[str, Any]
    configs: Sequence[triton.Config]


@dataclass
class _Recorder:
    """Launches recorded as if on a GPU of this compute capability."""

    capability: tuple[int, int]
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None


@contextmanager
def recorded_launches(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Record launches as if on such a GPU instead of running them; the contents of outputs are undefined."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(capability)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton interprets the kernel on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""
    return isinstance(kernel, InterpretedFunction)


def each_configuration() -> Iterator[int]:
    """Count from 0 up to the largest number of configurations that a kernel has which is launched meanwhile.

    While ``number`` is current, every kernel runs in its ``number``-th configuration, or, if that does not fit the
    device or the kernel has fewer, in another one. Nothing is measured.
    """
    global _fixed
    previous, number = _fixed, 0
    try:
        while True:
            _fixed = _Fixed(number)
            yield number
            number += 1
            if number >= _fixed.most:
                return
    finally:
        _fixed = previous


def may_measure() -> bool:
    """Whether measurements may choose a configuration: not where runs must repeat bit for bit."""
    return _fixed is None and not torch.are_deterministic_algorithms_enabled()


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability that configurations are chosen for; on a CPU that of an H100."""
    if _recorder is not None:
        return _recorder.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def precision_for(kernel: Any, dtype: torch.dtype, exact: bool = False) -> Precision:
    """How ``kernel`` multiplies tiles of ``dtype``.

    Tensor cores multiply float32 as three products of TF32, which is about as exact as float32. ``exact``: ordinary
    arithmetic instead, which needs fewer registers.
    """
    interpreted = is_interpreted(kernel)
    return Precision(
        products=("ieee" if exact else "tf32x3") if dtype == torch.float32 else "tf32",
        upcast=interpreted and dtype == torch.bfloat16,
        fast_sigmoid=dtype.itemsize == 2 and not interpreted,
    )


def launcher(
    kernel: Any,
    grid: Grid,
    configs: Sequence[triton.Config],
    tune_key: Hashable = (),
    zeroed: Sequence[str] = (),
) -> Callable[..., object]:
    """A callable that runs ``kernel`` on the arguments that it is called with.

    It runs the fastest of ``configs``, measured at the first launch of each ``tune_key``. Where runs must repeat bit
    for bit, it runs the first configuration that fits the device; in the interpreter, the first one.

    ``zeroed``: names of tensors of zeros of which each configuration writes another part. They are set to zero again
    after a measurement.
    """
    if _recorder is not None:
        return partial(_record, kernel, configs)
    if is_interpreted(kernel):
        return partial(kernel[grid], **configs[0].kwargs)
    if len(configs) == 1:
        return partial(kernel[grid], **configs[0].all_kwargs(), enable_fp_fusion=True)
    if not may_measure():
        return partial(_launch_first, kernel, grid, _in_order(configs))
    return partial(_tuner(kernel, configs, tune_key, zeroed)[grid], enable_fp_fusion=True)


def _record(kernel: Any, configs: Sequence[triton.Config], /, **arguments: Any) -> None:
    assert _recorder is not None
    _recorder.launches.append(Launch(kernel, arguments, configs))


def _in_order(configs: Sequence[triton.Config]) -> Sequence[triton.Config]:
    """The configurations, beginning with the one that :func:`each_configuration` prescribes."""
    if _fixed is None:
        return configs
    _fixed.most = max(_fixed.most, len(configs))
    first = min(_fixed.number, len(configs) - 1)
    return [*configs[first:], *configs[:first]]


def _launch_first(kernel: Any, grid: Grid, configs: Sequence[triton.Config], /, **arguments: Any) -> None:
    for config in configs:
        try:
            kernel[grid](**arguments, **config.all_kwargs(), enable_fp_fusion=True)
            return
        except OutOfResources as error:
            refused = error
    raise refused


def _tuner(kernel: Any, configs: Sequence[triton.Config], tune_key: Hashable, zeroed: Sequence[str]) -> Any:
    key = (kernel.fn.__qualname__, tune_key)
    if key not in _tuners:
        _tuners[key] = triton.autotune(list(configs), key=[], reset_to_zero=list(zeroed))(kernel)
    return _tuners[key]


def bucket(size: int) -> int:
    """``size`` rounded up to a power of two: launches of these sizes share one measurement."""
    return 1 << max(size - 1, 0).bit_length()
