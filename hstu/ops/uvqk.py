"""The gate, values, queries and keys of a layer from its input projection: ``split(SiLU(projected))``. Dispatcher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hstu.ops.backends import Backend
from hstu.ops.cpu.coverage import type_gap


def split_uvqk(
    projected: Tensor, head_dim: int, backend: Backend = Backend.PYTORCH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q, k, each [T, H, d]: views of one SiLU(projected). projected: [T, H · 4 · d], in the order [H, 4, d].

    Source: HSTU, arXiv 2402.17152, eq. 1.
    """
    if backend is Backend.CPU and type_gap(projected.dtype) is None:
        from hstu.ops.cpu.uvqk import split_uvqk as cpu

        return cpu(projected, head_dim)
    u, v, q, k = F.silu(projected).unflatten(1, (-1, 4, head_dim)).unbind(2)
    return u, v, q, k
