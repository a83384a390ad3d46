"""The self check of kernels: each machine compares them with PyTorch once before it first uses them.

Compilers, drivers and GPUs differ, and a defect in one of them would silently train a wrong model. The kernels of a
GPU are checked in a process of their own: :mod:`hstu.ops.check_process`.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu.ops.kernels import KernelShapes
from hstu.ops.layout import JaggedLayout, build_layout

log = logging.getLogger(__name__)

Errors = dict[str, tuple[float, float]]
"""Name of a comparison → relative error, and the largest error that rounding explains."""
Checks = Iterator[tuple[str, Callable[[], Errors]]]
"""Name of a case, and the function that runs it."""


def cache_directory() -> Path:
    """The user's cache directory (XDG_CACHE_HOME where that is set) for this package; it need not exist yet.

    Raises OSError if the user has no home directory.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("the user has no home directory; set HOME or XDG_CACHE_HOME") from error
    return Path(root) / "hstu"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclude all other processes of this host; the lock ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def record_passed(passed: Path) -> None:
    """Create the file that marks the check as passed; where that fails, log that the check will be repeated."""
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError as error:
        log.info("%s cannot be written (%s): the kernels will be checked again", passed, error.strerror)


def main(checks: Callable[[torch.device, KernelShapes], Checks], all_shapes: Iterable[KernelShapes]) -> None:
    """The command of a backend: run its checks now, whatever has been recorded, and print one line per error.

    Exits with 1 if an error is too large.
    """
    parser = argparse.ArgumentParser(description="Compare the kernels of a backend with PyTorch.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--head-dim", type=int, nargs="+", help="only these")
    parser.add_argument("--dtype", help="only this one, such as bfloat16")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run none")
    options = parser.parse_args()
    # With deterministic algorithms, torch fills new tensors with nan: what a kernel fails to write is found.
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = 0
    for shapes in all_shapes:
        if options.head_dim and shapes.head_dim not in options.head_dim:
            continue
        if options.dtype and shapes.dtype != getattr(torch, options.dtype):
            continue
        for case, measure in checks(torch.device(options.device), shapes):
            if options.list:
                print(case)
                continue
            for name, (error, tolerance) in measure().items():
                wrong += not error <= tolerance
                print(
                    f"{'ok   ' if error <= tolerance else 'WRONG'} {error:.1e} of {tolerance:.0e}  {name}", flush=True
                )
    print(f"{wrong} wrong")
    sys.exit(1 if wrong else 0)


def same_bits(results: Sequence[Tensor], repeated: Sequence[Tensor]) -> bool:
    """Whether two runs of a kernel gave the same bits."""
    return all(map(torch.equal, results, repeated))


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
