"""Vectors of length 1, for comparison by the cosine of their angle. Dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.backends import Backend


def l2_normalise(vectors: Tensor, eps: float, backend: Backend = Backend.PYTORCH) -> Tensor:
    """``vectors`` [n, E] in float32 (float64 stays), each divided by its L2 norm or by ``eps``, if that is larger."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    if backend is Backend.CPU and vectors.dtype == torch.float32:
        from hstu.ops.cpu.normalise import l2_normalise as cpu

        return cpu(vectors, eps)
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=eps)
