"""The self check of kernels: each machine compares them with PyTorch once before it first uses them.

Compilers, drivers and GPUs differ, and a defect in one of them would silently train a wrong model. The kernels of a
GPU are checked in a process of their own: :mod:`hstu.ops.check_process`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hstu.ops.kernels import KernelShapes
from hstu.ops.layout import JaggedLayout, build_layout

log = logging.getLogger(__name__)

Errors = dict[str, tuple[float, float]]
"""Name of a comparison → relative error, and the largest error that rounding explains."""


class Check(NamedTuple):
    """A case of the self check. The cases of one operator follow one another."""

    operator: str
    """A name of hstu.ops.kernels.OPERATORS, or SLOTS."""
    case: str
    measure: Callable[[], Errors]


Checks = Iterator[Check]


def cache_directory() -> Path:
    """The user's cache directory (XDG_CACHE_HOME where that is set) for this package; it need not exist yet.

    Raises OSError if the user has no home directory.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("the user has no home directory; set HOME or XDG_CACHE_HOME") from error
    return Path(root) / "hstu"


def record_passed(passed: Path) -> None:
    """Create the file that marks the check as passed; where that fails, log that the check will be repeated."""
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError as error:
        log.info("%s cannot be written (%s): the kernels will be checked again", passed, error.strerror)


def describe(error: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:500]


def is_usable(device: torch.device) -> bool:
    """Whether this process can go on with the device after an exception: CUDA ends with an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def main(
    checks: Callable[[torch.device, KernelShapes | None], Checks], all_shapes: Iterable[KernelShapes | None]
) -> None:
    """The command of a backend: run its checks now, whatever has been recorded, and print one line per error.

    It goes on after an exception. Prints the failures last, and exits with 1 if there are any.
    """
    parser = argparse.ArgumentParser(description="Compare the kernels of a backend with PyTorch.")
    parser.add_argument("--device", type=torch.device, default="cuda:0")
    parser.add_argument("--head-dim", type=int, nargs="+", help="of the shapes of models, only these")
    parser.add_argument("--dtype", help="of the shapes of models, only this one, such as bfloat16")
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), help="2 3: of every 3 cases the second")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run none")
    options = parser.parse_args()
    # With deterministic algorithms, torch fills new tensors with nan: what a kernel fails to write is found.
    torch.use_deterministic_algorithms(True, warn_only=True)

    def is_chosen(shapes: KernelShapes | None) -> bool:
        if shapes is None:
            return True
        right_dtype = options.dtype is None or shapes.dtype == getattr(torch, options.dtype)
        return right_dtype and (options.head_dim is None or shapes.head_dim in options.head_dim)

    cases = (check for shapes in filter(is_chosen, all_shapes) for check in checks(options.device, shapes))
    first, step = options.part
    failures = []
    for check in islice(cases, first - 1, None, step):
        if options.list:
            print(check.case)
            continue
        try:
            errors = check.measure()
        except Exception as error:
            failures.append(f"{check.case}: {describe(error)}")
            print(f"FAILED {failures[-1]}", flush=True)
            if not is_usable(options.device):
                failures.append("the device cannot be used after this error: later cases were not run")
                break
            continue
        for name, (difference, tolerance) in errors.items():
            is_right = difference <= tolerance
            line = f"{difference:.1e} of {tolerance:.0e}  {name}"
            failures += [] if is_right else [line]
            print(f"{'ok   ' if is_right else 'WRONG'} {line}", flush=True)
    print(f"{len(failures)} failures", *failures, sep="\n")
    sys.exit(1 if failures else 0)


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
