"""HSTU attention by CUTLASS kernels. See :func:`hstu.ops.attention.hstu_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.attention import AttentionRule
from hstu.ops.cutlass.coverage import CAPABILITIES, attention_gap
from hstu.ops.cutlass.kernels import ALIGNMENT, WIDEST_JOINT, Kernel, Variant, arguments, compiled
from hstu.ops.cutlass.schedule import leading_rows, make_schedule
from hstu.ops.layout import JaggedLayout
from hstu.ops.relative_bias import RelativeBias


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, rule: AttentionRule, bias: RelativeBias | None = None
) -> Tensor:
    """See :class:`hstu.ops.attention.AttentionKernels`; no bias."""
    gap = attention_gap(q.shape[2], q.dtype, has_bias=bias is not None)
    if gap is not None:
        raise ValueError(f"no CUTLASS kernel: {gap}")
    if k.shape != q.shape or v.shape != q.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError("q, k and v must agree in shape and type")
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _launch(Kernel.FORWARD, [_loadable(q), _loadable(k), _loadable(v)], [out], layout, rule)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    rule: AttentionRule,
    bias: RelativeBias | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """See :class:`hstu.ops.attention.AttentionKernels`. The gradients have the same bits in every run."""
    grad, q, k, v = _loadable(grad), _loadable(q), _loadable(k), _loadable(v)
    grad_q, grad_k, grad_v = grads
    if q.shape[2] <= WIDEST_JOINT:
        _launch(Kernel.KEYS, [k, q, v, grad], [grad_k, grad_v], layout, rule)
    else:
        _launch(Kernel.KEYS, [k, q, v, grad], [grad_k], layout, rule)
        _launch(Kernel.VALUES, [k, q, grad], [grad_v], layout, rule)
    _launch(Kernel.QUERIES, [q, k, grad, v], [grad_q], layout, rule)


def _launch(
    kernel: Kernel, inputs: list[Tensor], outs: list[Tensor], layout: JaggedLayout, rule: AttentionRule
) -> None:
    tokens, heads, head_dim = inputs[0].shape
    if tokens == 0:
        return
    device = inputs[0].device
    variant = Variant(kernel, inputs[0].dtype, head_dim, CAPABILITIES[torch.cuda.get_device_capability(device)])
    items, tiles = _schedule_on(device, variant, layout, rule)
    work = len(items) * heads
    with torch.cuda.device(device):
        compiled(variant)(
            *arguments(
                variant,
                [(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)) for tensor in (*inputs, *outs)],
                (items.data_ptr(), tiles.data_ptr()),
                (tokens, heads, len(items), leading_rows(layout, rule), max(layout.candidate_group_tokens, 1)),
                (rule.alpha, 1.0 / rule.scaling_seqlen),
                grid=min(work, torch.cuda.get_device_properties(device).multi_processor_count),
                stream=torch.cuda.current_stream(device).cuda_stream,
            )
        )


def _schedule_on(
    device: torch.device, variant: Variant, layout: JaggedLayout, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """Items and tiles of :class:`hstu.ops.cutlass.schedule.Schedule`, made once a layout."""
    shape = variant.shape
    key = ("cutlass", rule, shape.rows, shape.block, shape.tile)
    if key not in layout.cache:
        schedule = make_schedule(layout, rule, shape.rows, shape.block, shape.tile)
        layout.cache[key] = tuple(
            torch.from_numpy(array).to(device, non_blocking=True) for array in (schedule.items, schedule.tiles)
        )
    return layout.cache[key]


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a dense copy where addresses or strides are not what TMA and cp.async take."""
    size = tensor.element_size()
    is_aligned = tensor.data_ptr() % ALIGNMENT == 0 and all(s * size % ALIGNMENT == 0 for s in tensor.stride()[:2])
    # A stride of 0 is an expanded tensor, which a TMA descriptor cannot say.
    if tensor.stride(2) == 1 and is_aligned and 0 not in tensor.stride():
        return tensor
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
