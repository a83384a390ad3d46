"""Operators that have CUTLASS kernels."""

from typing import Any

from hstu.ops.cutlass import attention
from hstu.ops.kernels import AttentionKernels

OPERATORS: dict[str, Any] = {"attention": AttentionKernels(attention.forward, attention.backward)}
