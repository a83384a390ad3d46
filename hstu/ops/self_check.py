"""The self check of kernels: each machine compares them with PyTorch once before it first uses them.

Compilers, drivers and GPUs differ, and a defect in one of them would silently train a wrong model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu.ops.layout import build_layout
from hstu.ops.types import JaggedLayout

log = logging.getLogger(__name__)

Errors = Mapping[str, tuple[float, float]]
"""Name of a comparison → relative error, and the largest error that rounding explains."""


class KernelsDisagree(Exception):
    """A kernel is wrong on this machine; the message names it and its error."""


def cache_directory() -> Path:
    """The user's cache directory (XDG_CACHE_HOME where that is set) for this package; it need not exist yet.

    Raises OSError if the user has no home directory.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("the user has no home directory; set HOME or XDG_CACHE_HOME") from error
    return Path(root) / "hstu"


def check_gpu_kernels(
    backend: str, sources: Path, compiler_version: str, device: torch.device, measure: Callable[[torch.device], Errors]
) -> None:
    """Compare kernels with PyTorch, unless this machine has compared the same kernels on the same GPU before.

    Args:
        backend: Name for messages and for the file that records success.
        sources: Folder of the kernels.
        compiler_version: Version of Triton or CUTLASS.
        device: GPU to run on.
        measure: Runs the comparisons on a device.

    Raises:
        KernelsDisagree: an error exceeds its tolerance or is not finite.
    """
    name = f"{backend.lower()}_kernels_{_gpu_key(sources, compiler_version, device)}.checked"
    try:
        passed = cache_directory() / name
    except OSError:  # no home directory: check in every run
        passed = None
    if passed is not None and passed.exists():
        return
    begun = time.monotonic()
    errors = measure(device)
    for operator, (error, tolerance) in errors.items():
        if not error <= tolerance:
            raise KernelsDisagree(
                f"the {backend} kernel of {operator} differs from PyTorch by {error:.2g}, more than {tolerance} ("
                f"relative error); please report this with the versions of {backend} and of the driver"
            )
    worst = max(error / tolerance for error, tolerance in errors.values() if tolerance)
    seconds = time.monotonic() - begun
    log.info("%s kernels agree with PyTorch to %.0f %% of the tolerance (%.1f s)", backend, 100 * worst, seconds)
    if passed is not None:
        record_passed(passed)


def _gpu_key(sources: Path, compiler_version: str, device: torch.device) -> str:
    """A hash of everything that decides the machine code and what runs it: source files, versions and the GPU."""
    digest = hashlib.sha256()
    for source in sorted(sources.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    digest.update(repr((compiler_version, torch.__version__, torch.version.cuda, name, capability)).encode())
    return digest.hexdigest()[:16]


def record_passed(passed: Path) -> None:
    """Create the file that marks the check as passed; where that fails, log that the check will be repeated."""
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError as error:
        log.info("%s cannot be written (%s): the kernels will be checked again", passed, error.strerror)


def print_errors(measure: Callable[[torch.device], Errors]) -> None:
    """Run the comparisons on the current GPU, whatever has been recorded, and print one line for each."""
    for name, (error, tolerance) in measure(torch.device("cuda", torch.cuda.current_device())).items():
        print(f"{'ok   ' if error <= tolerance else 'WRONG'} {error:.1e} of {tolerance:.0e}  {name}")


def largest_error(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference between two lists of tensors, each relative to the largest expected number of its tensor."""
    errors = [
        float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in zip(computed, expected, strict=True)
    ]
    return float(np.max(errors))  # np.max returns nan where an error is nan, max() may not


def small_layout(
    device: torch.device,
    num_items: Sequence[int] = (1, 40, 130, 17),
    num_candidates: Sequence[int] = (0, 5, 0, 3),
    num_contextuals: int = 1,
    group_size: int = 2,
) -> JaggedLayout:
    """Sequences of unequal lengths with context and candidates, whose items lie a second to months apart."""
    gaps = np.exp(np.random.default_rng(0).uniform(0, 16, sum(num_items))).astype(np.int64)
    return build_layout(
        item_lengths=np.array(num_items),
        num_sequences=len(num_items),
        num_contextuals=num_contextuals,
        num_candidates=np.array(num_candidates),
        tokens_per_item=1,
        target_group_size=group_size,
        device=device,
        item_times=torch.from_numpy(np.cumsum(gaps)).to(device),
    )
