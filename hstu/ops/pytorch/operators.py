"""The reference kernels: every operator in plain PyTorch, on any device and in any dtype."""

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops import kernels
from hstu.ops.layout import TokenOrder
from hstu.ops.pytorch import attention, norm, softmax_loss
from hstu.ops.row_update import update_rows


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products. If not, PyTorch takes 2 to 9 times as long as in float32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their dtype, summed in float32 or wider."""
    return (a.float() @ b.float()).bfloat16() if _needs_float32(a) else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, rounded once."""
    if _needs_float32(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()
    return F.linear(x, weight, bias)


def _needs_float32(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bfloat16()


def project_uvqk(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`hstu.ops.kernels.ProjectionKernels`."""
    projected = linear(x, weight, bias)
    return projected, F.silu(projected)


def add_positions(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.add_positions`."""
    return x + F.embedding(positions.clamp(max=len(table) - 1), table)


def jagged_concat(parts: Sequence[Tensor], order: TokenOrder) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.jagged_concat`."""
    return _Permute.apply(torch.cat(list(parts)), order.source, order.inverse)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient of a permutation is its inverse: a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(source, inverse)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        source, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, source), None, None


REFERENCE_KERNELS = kernels.Kernels(
    attention=kernels.AttentionKernels(attention.forward, attention.backward, serves_ranges=True),
    add_layer_norm=kernels.AddLayerNormKernels(norm.add_layer_norm_forward, norm.add_layer_norm_backward),
    project_uvqk=kernels.ProjectionKernels(project_uvqk, F.silu),
    norm_mul_dropout=kernels.GateKernels(norm.gate_forward, norm.gate_backward),
    sampled_softmax_loss=softmax_loss.sampled_softmax_loss,
    l2_normalize=softmax_loss.l2_normalize,
    pool_softmax_loss=softmax_loss.pool_softmax_loss,
    jagged_concat=jagged_concat,
    add_positions=add_positions,
    update_rows=update_rows,
    served_by=dict.fromkeys(kernels.OPERATORS, kernels.ServedBy(kernels.Backend.PYTORCH)),
)
