"""What a rank checks about its machine before it joins the others: GPUs, kernels of tables, networks and cuBLAS."""

from __future__ import annotations

import ctypes
import fnmatch
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  # registers torch.ops.fbgemm
import torch

from hstu.base.errors import ConfigError

_NO_DEVICE, _STUB_LIBRARY = 100, 34
"""Results of cuInit on machines without an NVIDIA GPU (cuda.h)."""
_ON_THE_CPU = 'To compute on the CPU all the same, hide the GPUs: CUDA_VISIBLE_DEVICES="" before the command.'
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic."""


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver of this machine says."""

    gpus: int
    """GPUs that this process may use."""
    cuda: tuple[int, int] = (0, 0)
    """Newest CUDA version that the driver supports."""
    error: int = 0
    """Result of cuInit; 0: the driver works."""


def require_usable_gpus() -> None:
    """Raise ConfigError where this machine has NVIDIA GPUs and torch cannot use them.

    Without this check a run would silently train on the CPU.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return
    driver = read_driver()
    if driver is None or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
        reason = "it finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
    built_for = torch.version.cuda
    raise ConfigError(why_gpus_are_unused(driver, torch.__version__, built_for, reason))


def read_driver() -> Driver | None:
    """Query the NVIDIA driver without torch. None: there is none, or no GPU that this process may use."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    error = library.cuInit(0)
    if error in (_NO_DEVICE, _STUB_LIBRARY):
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    if error == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
        if count.value == 0:
            return None
    return Driver(count.value, (version.value // 1000, version.value % 1000 // 10), error)


def why_gpus_are_unused(driver: Driver, torch_version: str, built_for: str | None, reason: str) -> str:
    """The error for GPUs that torch cannot use.

    built_for: CUDA version of torch; None for a CPU build. reason: torch's own.
    """
    gpus = f"{driver.gpus} NVIDIA GPU{'s'[: driver.gpus > 1]}" if driver.gpus else "NVIDIA GPUs"
    supported = ".".join(map(str, driver.cuda))
    if driver.error:
        what = f"the driver does not start (cuInit: error {driver.error})"
        todo = "Run nvidia-smi, which says more; after an update of the driver the machine must be restarted."
    elif built_for is None:
        what = f"torch {torch_version} is a build for CPUs"
        todo = "Install the CUDA build, without an index of CPU builds: rm -rf .venv && scripts/install.sh."
    elif int(built_for.partition(".")[0]) > driver.cuda[0]:
        what = f"torch {torch_version} needs CUDA {built_for}, and the driver supports CUDA {supported} at most"
        todo = f"Update the NVIDIA driver to one for CUDA {built_for} (nvidia-smi shows both versions)."
    else:
        what = f"torch {torch_version} (CUDA {built_for}; driver: CUDA {supported}) cannot use them: {reason}"
        todo = 'Check nvidia-smi and python -c "import torch; torch.cuda.init()".'
    return f"this machine has {gpus}, but {what}. {todo} {_ON_THE_CPU}"


def require_table_kernels(device: torch.device) -> None:
    """Raise ConfigError where FBGEMM, which looks up rows and counts ids, cannot compute on this GPU."""
    try:
        torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(2, dtype=torch.int64, device=device)).cpu()
    except RuntimeError as error:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise ConfigError(why_no_table_kernels(name, capability, error)) from error


def why_no_table_kernels(name: str, capability: tuple[int, int], error: RuntimeError) -> str:
    """The error for a GPU for which FBGEMM has no kernels. Attention and the other layers have Triton kernels."""
    major, minor = capability
    if isinstance(error, NotImplementedError):
        what = "is a build for CPUs"
        todo = "Install the CUDA build: rm -rf .venv && scripts/install.sh."
    elif "no kernel image" in str(error):
        what = f"has no kernels for {name} (compute capability {major}.{minor})"
        todo = f"Install a build of FBGEMM with them (built from source: TORCH_CUDA_ARCH_LIST={major}.{minor})."
    else:
        what = f"does not run on {name} (compute capability {major}.{minor}): {str(error).strip().splitlines()[0]}"
        todo = "Check nvidia-smi."
    return f"the installed FBGEMM, which looks up the rows of tables, {what}. {todo} {_ON_THE_CPU}"


def require_networks(device_type: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME on a GPU, names no network of this host."""
    interfaces = [name for _, name in socket.if_nameindex()]
    checks = {"GLOO_SOCKET_IFNAME": unknown_to_gloo}
    if device_type == "cuda":
        checks["NCCL_SOCKET_IFNAME"] = unknown_to_nccl
    problems = [
        f"{variable}={environment[variable]}: {socket.gethostname()} has no network interface {' or '.join(unknown)}; "
        f"it has {', '.join(interfaces)}. Name one that connects the hosts (ip -brief address), or unset {variable}"
        for variable, unknown_names in checks.items()
        if environment.get(variable)
        for unknown in [unknown_names(environment[variable], interfaces)]
        if unknown
    ]
    if problems:
        raise ConfigError(problems)


def unknown_to_gloo(value: str, interfaces: Sequence[str]) -> list[str]:
    """The names in a comma-separated list that are no interface: gloo uses each of them."""
    return [name for name in value.split(",") if name not in interfaces]


def unknown_to_nccl(value: str, interfaces: Sequence[str]) -> list[str]:
    """The names of NCCL's list, if none of them is an interface: NCCL uses those that it finds.

    A name is a prefix. ``=`` before the list: whole names. ``^`` before it: all interfaces but these.
    """
    if value.startswith("^"):
        return []
    names = value.removeprefix("=").split(",")
    pattern = "{}" if value.startswith("=") else "{}*"
    found = any(fnmatch.filter(interfaces, pattern.format(name)) for name in names)
    return [] if found else names


def make_cublas_deterministic() -> None:
    """Let cuBLAS work in buffers that make its results repeatable. Call it before CUDA starts.

    Raises ConfigError if CUBLAS_WORKSPACE_CONFIG has another value already.
    """
    value = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _DETERMINISTIC_WORKSPACES[0])
    if value not in _DETERMINISTIC_WORKSPACES:
        raise ConfigError(
            f"TrainerArgs.deterministic = True: with CUBLAS_WORKSPACE_CONFIG={value} cuBLAS is not deterministic; "
            f"unset it, or set it to {' or '.join(_DETERMINISTIC_WORKSPACES)}"
        )
