"""How a kernel is launched: tuned, with the first configuration where runs must repeat, interpreted, or only recorded.

Every wrapper of this package launches through :func:`launch`, which is why compiling ahead (``compile_ahead.py``) can
record what a wrapper would run, with the very arguments, and compile that for a GPU which is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]

_tuners: dict[Hashable, Any] = {}
_measures = True


@dataclass(frozen=True)
class Launch:
    """What would have been run: a kernel, its arguments by name, and the configurations to choose from."""

    kernel: Any
    arguments: Mapping[str, Any]
    configs: Sequence[triton.Config]


@dataclass
class Recorder:
    """Launches recorded for a GPU of this compute capability."""

    capability: tuple[int, int]
    launches: list[Launch] = field(default_factory=list)


_recorder: Recorder | None = None


@contextmanager
def recorded_launches(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Within, nothing is run (outputs hold anything): launches for such a GPU are recorded instead."""
    global _recorder
    previous, _recorder = _recorder, Recorder(capability)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton was imported to interpret kernels on the CPU (TRITON_INTERPRET=1)."""
    return isinstance(kernel, InterpretedFunction)


@contextmanager
def first_configurations() -> Iterator[None]:
    """Within, nothing is measured: the first configuration runs."""
    global _measures
    previous, _measures = _measures, False
    try:
        yield
    finally:
        _measures = previous


def may_measure() -> bool:
    """Whether measurements may choose a configuration: not where runs have to repeat bit for bit."""
    return _measures and not torch.are_deterministic_algorithms_enabled()


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability that configurations are chosen for; the interpreter takes those of an H100."""
    if _recorder is not None:
        return _recorder.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def multiplication(kernel: Any, dtype: torch.dtype, exact: bool = False) -> dict[str, Any]:
    """The constants PRECISION, UPCAST and FAST of kernels that multiply tiles of ``dtype``.

    float32 is multiplied by tensor cores as three products of TF32, which is about as exact as float32; ``exact``: by
    ordinary arithmetic, which needs fewer registers.
    """
    interpreted = is_interpreted(kernel)
    return {
        "PRECISION": ("ieee" if exact else "tf32x3") if dtype == torch.float32 else "tf32",
        "UPCAST": interpreted and dtype == torch.bfloat16,
        "FAST": dtype.itemsize == 2 and not interpreted,
    }


def launch(
    kernel: Any,
    grid: Grid,
    configs: Sequence[triton.Config],
    tune_key: Hashable,
    **arguments: Any,
) -> None:
    """Run ``kernel`` with the fastest of ``configs``, measured at the first launch of each ``tune_key``.

    The first configuration that fits the device is taken instead where runs must repeat bit for bit, in the
    interpreter, and where there is only one.
    """
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, arguments, configs))
        return
    if is_interpreted(kernel):
        kernel[grid](**arguments, **configs[0].kwargs)
    elif len(configs) == 1 or not may_measure():
        _launch_first(kernel, grid, configs, arguments)
    else:
        _tuner(kernel, configs, tune_key)[grid](**arguments, enable_fp_fusion=True)


def _launch_first(kernel: Any, grid: Grid, configs: Sequence[triton.Config], arguments: Mapping[str, Any]) -> None:
    for config in configs:
        try:
            kernel[grid](**arguments, **config.all_kwargs(), enable_fp_fusion=True)
            return
        except OutOfResources as error:
            refused = error
    raise refused


def _tuner(kernel: Any, configs: Sequence[triton.Config], tune_key: Hashable) -> Any:
    key = (kernel.fn.__qualname__, tune_key)
    if key not in _tuners:
        _tuners[key] = triton.autotune(list(configs), key=[])(kernel)
    return _tuners[key]


def bucket(size: int) -> int:
    """``size`` rounded up to a power of two: sizes that are tuned together."""
    return 1 << max(size - 1, 0).bit_length()


def strides_of(tensor: Tensor, names: str, prefix: str) -> dict[str, int]:
    """The strides of ``tensor`` as the arguments stride_{prefix}{name}."""
    return {f"stride_{prefix}{name}": stride for name, stride in zip(names, tensor.stride(), strict=True)}
