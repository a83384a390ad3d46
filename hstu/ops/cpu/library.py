"""The compiled kernels as Python functions, and tensors as their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hstu.ops.cpu.build import library_file

KEPT_BYTES = 1 << 30

pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels, loaded once a process. Raises hstu.ops.cpu.build.KernelsUnavailable.

    PyTorch is imported, and its OpenMP loaded for all, before: kernels and PyTorch share one set of threads.
    """
    loaded = ctypes.CDLL(str(library_file()))
    loaded.hstu_packed_width.restype = int64
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element lies."""
    return None if tensor is None else tensor.data_ptr()


def strides(tensor: Tensor, dims: int = 2) -> Any:
    """The strides of the first ``dims`` dimensions, in elements, as a C array."""
    return (int64 * dims)(*tensor.stride()[:dims])


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def is_bfloat(tensors: Sequence[Tensor]) -> bool:
    """True for bfloat16, False for float32; all tensors are of one type."""
    assert len({tensor.dtype for tensor in tensors}) == 1, "tensors of several types"
    return tensors[0].dtype == torch.bfloat16


def num_threads() -> int:
    """Threads a kernel runs on: those of PyTorch."""
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """From now on the process keeps what tensors have freed, up to 1 GiB, instead of giving it back to the system.

    A training step frees and allocates the same tensors again, and each new page costs as much as some hundred
    nanoseconds of arithmetic: a tenth of the step at ML-1M's size.
    """
    library().hstu_keep_freed_memory(int64(KEPT_BYTES))
