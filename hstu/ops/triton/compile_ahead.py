"""Compile recorded launches without a GPU into Triton's cache, exactly as a launch compiles them."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import create_function_from_signature

from hstu.ops.compile_ahead import Job, adopt_triton_cache
from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.self_check import checks
from hstu.ops.triton.launch import Launch, recorded_launches
from hstu.ops.triton.slots import SlotIndex, start_rows

WARP_SIZE = 32


class _Driver:
    """Replaces the driver of a GPU, so that Triton compiles as for a launch on that GPU."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, WARP_SIZE)

    def get_current_device(self) -> str:
        """Unique per GPU and cache directory, because Triton remembers per device which kernels the cache has."""
        return f"sm_{self._capability} in {knobs.cache.dir}"

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_kernel(launch: Launch, config: triton.Config, capability: int) -> Any:
    """Compile a launch for sm_{capability} unless it is cached. Returns Triton's kernel, or raises CompilationError."""
    driver.set_active(_Driver(capability))
    try:
        return launch.kernel.warmup(grid=(1,), **launch.arguments, **config.all_kwargs(), enable_fp_fusion=True)
    finally:
        driver.set_active(None)  # Triton finds the driver of this machine when it needs one


def jobs(shapes: KernelShapes | None, capability: int, operators: Sequence[str]) -> list[Job]:
    """Compile jobs of all kernels in the self check of these operators; shapes None: of dynamic tables."""
    adopt_triton_cache(Path(knobs.cache.dir))
    with recorded_launches(divmod(capability, 10)) as launches:
        if shapes is None:  # the self check launches fewer kernels
            run_slots()
        else:
            for check in checks(Backend.TRITON, torch.device("cpu"), shapes):
                if check.operator in operators:
                    check.measure()
    return jobs_of(launches, capability)


def run_slots() -> None:
    """Launch the kernels of dynamic tables."""
    slots, row_ids = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    index, number = SlotIndex(torch.zeros(48, dtype=torch.int64)), slots[:1]
    index.insert(slots, number)
    index.find(slots)
    rows = torch.zeros(64, 128)
    start_rows(rows, slots, number, slots, torch.zeros(1 << 16), init_std=0.1)
    start_rows(rows, row_ids, number)


def jobs_of(launches: Iterable[Launch], capability: int) -> list[Job]:
    """One job per distinct kernel of the launches, in its first configuration, which runs if it fits the device."""
    different = {specialized_kernel(launch, launch.configs[0], capability): launch for launch in launches}
    return [
        Job(
            f"{launch.kernel.fn.__name__} ({describe_config(launch.configs[0])})",
            partial(compile_kernel, launch, launch.configs[0], capability),
        )
        for launch in different.values()
    ]


def specialized_kernel(launch: Launch, config: triton.Config, capability: int) -> str:
    """Key of the machine code of a launch: launches with equal keys are compiled once per process."""
    _, _, specialization, options = bound_arguments(launch, config, capability)
    return f"{launch.kernel.fn.__name__} {specialization} {options}"


def bound_arguments(launch: Launch, config: triton.Config, capability: int) -> tuple[Any, Any, Any, Any]:
    """As JITFunction.run: (backend, arguments, specialization of their values, options)."""
    backend, kernel = make_backend(GPUTarget("cuda", capability, WARP_SIZE)), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return backend, *bind(**launch.arguments, **config.all_kwargs(), enable_fp_fusion=True)


def describe_config(config: triton.Config) -> str:
    """Tile sizes, warps and stages."""
    tile = " × ".join(str(value) for value in config.kwargs.values())
    return f"{tile or 'one'}, {config.num_warps} warps, {config.num_stages} stages"
