"""The gate, values, queries and keys of a layer: ``split(SiLU(x W_uvqk + b))``. Dispatchers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hstu.ops.backends import Backend
from hstu.ops.cpu.coverage import type_gap
from hstu.ops.triton import coverage as triton_coverage


def project_uvqk(
    x: Tensor, projection: nn.Module, head_dim: int, backend: Backend = Backend.PYTORCH
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, D] → u, v, q, k, each [T, H, d] and a view of one tensor, and what that tensor is SiLU of: [T, H · 4 · d].

    ``projection``: D → H · 4 · d. A plain linear layer may be computed together with SiLU; then the last result is
    there to recompute from, and has no gradient.
    """
    if backend.uses_triton and type(projection) is nn.Linear and triton_coverage.type_gap(x.dtype) is None:
        from hstu.ops.triton.linear import uvqk as triton

        return triton(x, projection.weight, projection.bias, head_dim)
    projected: Tensor = projection(x)
    return *split_uvqk(projected, head_dim, backend), projected


def activate(projected: Tensor, backend: Backend = Backend.PYTORCH) -> Tensor:
    """SiLU(projected) with the bits of :func:`project_uvqk`, to recompute it; without a gradient."""
    if backend is Backend.TRITON and triton_coverage.type_gap(projected.dtype) is None:
        from hstu.ops.triton.linear import silu as triton

        return triton(projected)
    return F.silu(projected)


def split_uvqk(
    projected: Tensor, head_dim: int, backend: Backend = Backend.PYTORCH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q, k, each [T, H, d]: views of one SiLU(projected). projected: [T, H · 4 · d], in the order [H, 4, d].

    Source: HSTU, arXiv 2402.17152, eq. 1.
    """
    if backend is Backend.CPU and type_gap(projected.dtype) is None:
        from hstu.ops.cpu.uvqk import split_uvqk as cpu

        return cpu(projected, head_dim)
    if backend.uses_triton and triton_coverage.type_gap(projected.dtype) is None:
        from hstu.ops.triton.linear import split_uvqk as triton

        return triton(projected, head_dim)
    u, v, q, k = F.silu(projected).unflatten(1, (-1, 4, head_dim)).unbind(2)
    return u, v, q, k
