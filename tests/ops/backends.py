"""Which fast backends the shared tests drive here, where their tensors lie, and how exact they are."""

from __future__ import annotations

import os

import pytest
import torch

from hstu.ops.backends import Backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch: its kernels run on the CPU, by NumPy. tests/ops/triton/test_interpreted.py starts pytest so."""

needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU"),
)
TRITON = pytest.param(Backend.TRITON, marks=() if INTERPRETED else needs_gpu)
BACKENDS = [TRITON] if INTERPRETED else [Backend.CPU, TRITON]
CUTLASS = pytest.param(Backend.CUTLASS, marks=needs_gpu)
ATTENTION = BACKENDS if INTERPRETED else [*BACKENDS, CUTLASS]
FULL_SIZE = [pytest.param(Backend.TRITON, marks=pytest.mark.slow)] if INTERPRETED else ATTENTION
"""For inputs that take minutes to interpret."""
MOST_HEADS = 1 if INTERPRETED else 3

# Of the largest number. 16-bit types round what a backend returns; Triton rounds the weights of the values, too, and on
# a GPU multiplies float32 as three products of TF32. In float16 the C++ backend's place is taken by PyTorch.
TOLERANCE = {
    Backend.CPU: {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    Backend.TRITON: {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3},
    Backend.CUTLASS: {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3},
}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_of(backend: Backend) -> torch.device:
    """Where the backend's tensors lie."""
    return torch.device("cuda" if backend.uses_triton and not INTERPRETED else "cpu")


def examples(count: int) -> int:
    """So many, but few where every one is interpreted: there the sizes matter less than that each branch is taken."""
    return max(3, count // 10) if INTERPRETED else count
