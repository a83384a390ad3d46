"""The operators that have CUTLASS kernels."""

from __future__ import annotations

from typing import Any

from hstu.ops.cutlass import attention
from hstu.ops.cutlass.support import unsupported_reason
from hstu.ops.kernels import AttentionKernels

__all__ = ["OPERATORS", "unsupported_reason"]

OPERATORS: dict[str, Any] = {"attention": AttentionKernels(attention.forward, attention.backward)}
