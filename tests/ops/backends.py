"""Which fast backends the shared tests drive here, on which device, how exact they are, and operators by backend."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.ops import functional
from hstu.ops.cpu.build import KernelsUnavailable, library_file
from hstu.ops.kernels import (
    AttentionConfig,
    AttentionInputs,
    Backend,
    GateConfig,
    GateInputs,
    Kernels,
    KernelShapes,
    Negatives,
    RelativeBias,
)
from hstu.ops.layout import JaggedLayout
from hstu.ops.select import resolve_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch: its kernels run on the CPU, by NumPy. tests/ops/triton/test_interpreted.py starts pytest so."""

ON_A_GPU = torch.cuda.is_available() and not INTERPRETED
needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU"),
)
TRITON = pytest.param(Backend.TRITON, marks=() if INTERPRETED else needs_gpu)
BACKENDS = [TRITON] if INTERPRETED else [Backend.CPU, TRITON]
CUTLASS = pytest.param(Backend.CUTLASS, marks=needs_gpu)
WITHOUT_A_GPU = BACKENDS[:1]
"""For what a GPU would show no better, and would have to compile other kernels for."""
FULL_SIZE = [pytest.param(Backend.TRITON, marks=pytest.mark.slow)] if INTERPRETED else [*BACKENDS, CUTLASS]
"""For inputs that take minutes to interpret."""
MOST_HEADS = 1 if INTERPRETED else 3

# Of the largest number. 16-bit types round what a backend returns; Triton rounds the weights of the values, too, and on
# a GPU multiplies float32 as three products of TF32. In float16 PyTorch replaces the C++ backend.
TOLERANCE = {
    Backend.CPU: {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    Backend.TRITON: {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3},
    Backend.CUTLASS: {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3},
}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def patch_language_once_per_launch() -> None:
    """Triton 3.9's interpreter patches its language at each call of a function in a kernel: half of its time."""
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def patch_once(function: Any) -> Any:
        is_patched = id(function.__globals__) in patched
        patched.add(id(function.__globals__))
        return None if is_patched else patch(function)

    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


if INTERPRETED:
    patch_language_once_per_launch()


@functools.cache
def require_compiler() -> None:
    """Skip the test where the C++ kernels cannot be compiled."""
    try:
        library_file()
    except KernelsUnavailable as reason:
        pytest.skip(f"NEEDS A C++ COMPILER: {reason}")


def device_of(backend: Backend) -> torch.device:
    """Where the backend's tensors lie."""
    return torch.device("cuda" if backend in (Backend.TRITON, Backend.CUTLASS) and not INTERPRETED else "cpu")


def examples(count: int) -> int:
    """So many, but few where every one is interpreted, and on a GPU, where other shapes are other kernels to compile.

    There the sizes matter less than that each branch is taken.
    """
    return max(3, count // 10) if INTERPRETED or ON_A_GPU else count


def kernels_of(
    backend: Backend, width: int = 1, dtype: torch.dtype = torch.float32, *, has_bias: bool = False
) -> Kernels:
    """The kernels of a backend for heads, rows and vectors of ``width`` channels. Skips where they cannot be built."""
    if backend is Backend.CPU:
        require_compiler()
    return resolve_kernels(backend, KernelShapes(width, 1, width, width, dtype, has_bias))


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    *,
    bias: RelativeBias | None = None,
    backend: Backend = Backend.PYTORCH,
    shift: Tensor | None = None,
    **config: Any,
) -> Tensor:
    """Attention by a backend; ``config``: fields of AttentionConfig; ``shift``: q, k and v are pre-activations."""
    kernels = kernels_of(backend, q.shape[2], q.dtype, has_bias=bias is not None).attention
    return functional.hstu_attention(AttentionInputs(q, k, v, layout, AttentionConfig(**config), bias), kernels, shift)


def norm_mul_dropout(
    tensors: Sequence[Tensor], config: GateConfig, backend: Backend = Backend.PYTORCH, shift: Tensor | None = None
) -> Tensor:
    """The gated norm of x, u, weight and bias by a backend; ``shift``: u is a pre-activation."""
    x, u, weight, bias = tensors
    inputs = GateInputs(x, u, weight, bias, config)
    return functional.norm_mul_dropout(inputs, kernels_of(backend, 1, x.dtype).norm_mul_dropout, shift)


def softmax_loss(vectors: Sequence[Tensor], negatives: Negatives, backend: Backend = Backend.PYTORCH) -> Tensor:
    """The loss of queries, positives and a pool by a backend, on the device of the vectors."""
    queries, positives, pool = vectors
    kernels = kernels_of(backend, queries.shape[-1])
    kernel = kernels.pool_softmax_loss if negatives.draws is None else kernels.sampled_softmax_loss
    return functional.softmax_loss(queries, positives, pool, there(negatives, queries.device), kernel)


def there(tensors: Any, device: torch.device) -> Any:
    """A dataclass with its tensors, and the tensors of its dataclasses, on a device."""
    if dataclasses.is_dataclass(tensors) and not isinstance(tensors, type):
        return type(tensors)(**{name: there(value, device) for name, value in vars(tensors).items()})
    return tensors.to(device) if isinstance(tensors, Tensor) else tensors
