"""Matrix products of the layers; bfloat16 products use float32 on CPUs without bfloat16 instructions."""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products. If not, PyTorch takes 2 to 9 times as long as in float32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their dtype, summed in float32 or wider."""
    if a.dtype == torch.bfloat16 and a.device.type == "cpu" and not cpu_multiplies_bfloat16():
        return (a.float() @ b.float()).bfloat16()
    return a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b, rounded once."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bfloat16():
        return torch.addmm(bias.float(), x.float(), weight.float().t()).bfloat16()
    return torch.nn.functional.linear(x, weight, bias)
