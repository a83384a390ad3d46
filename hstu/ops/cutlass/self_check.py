"""Compares every CUTLASS kernel with PyTorch: see :mod:`hstu.ops.self_check`.

``python -m hstu.ops.cutlass.self_check`` compares them now and prints the errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from hstu.ops.cutlass.operators import OPERATORS
from hstu.ops.cutlass.support import DTYPES, HEAD_DIMS, unsupported_reason
from hstu.ops.functional import hstu_attention
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import Checks, Errors, main, same_bits, small_layout
from hstu.ops.types import AttentionConfig, AttentionKernels, JaggedLayout, KernelShapes

TOLERANCE = 1e-2
"""Largest norm of the error relative to the norm of the reference: above the rounding of 16-bit types, far below a
defect."""
MASKS = ((True, True), (True, False), (False, True))
"""is_causal, contextual_mask."""


def checks(device: torch.device, shapes: KernelShapes | None) -> Checks:
    """The kernels for the head dim and dtype of a model, with every mask; none if Triton serves these shapes."""
    if shapes is None or unsupported_reason("attention", shapes) is not None:
        return
    head_dim, dtype = shapes.head_dim, shapes.dtype
    for is_causal, contextual_mask in MASKS:
        config = AttentionConfig(head_dim**-0.5, 100, is_causal, contextual_mask)
        mask = f"{'causal' if is_causal else 'bidirectional'}, {'' if contextual_mask else 'no '}contextual mask"
        case = f"{head_dim} channels, {str(dtype).removeprefix('torch.')}, {mask}"
        yield f"attention ({case})", partial(_errors, case, device, head_dim, dtype, config)


def _errors(case: str, device: torch.device, head_dim: int, dtype: torch.dtype, config: AttentionConfig) -> Errors:
    """The errors of O, dQ, dK and dV relative to the norm, and whether repeats differ.

    As in the model, q, k and v are views of one tensor. The reference runs in float64 on the CPU.
    """
    cpu = torch.device("cpu")
    layout = _layout(cpu)
    generator = torch.Generator().manual_seed(0)
    uvqk = torch.randn(layout.num_tokens, 2, 4, head_dim, generator=generator).to(dtype)
    grad = torch.randn(layout.num_tokens, 2, head_dim, generator=generator).to(dtype)
    on_device = partial(_results, uvqk.to(device), grad, _layout(device), config, OPERATORS["attention"])
    ours, repeated = on_device(), on_device()
    exact = _results(uvqk.double(), grad, layout, config, REFERENCE_KERNELS.attention)
    names = [f"{name} ({case})" for name in ("attention", "dQ", "dK", "dV")]
    errors = [float((each.double() - of).norm() / of.norm()) for each, of in zip(ours, exact, strict=True)]
    differs = {f"attention, repeated ({case})": (float(not same_bits(ours, repeated)), 0.0)}
    return {name: (error, TOLERANCE) for name, error in zip(names, errors, strict=True)} | differs


def _results(
    uvqk: Tensor, grad: Tensor, layout: JaggedLayout, config: AttentionConfig, kernels: AttentionKernels
) -> list[Tensor]:
    """O, dQ, dK and dV on the CPU."""
    with torch.enable_grad():
        q, k, v = (part.detach().requires_grad_() for part in uvqk.unbind(2)[1:])
        out = hstu_attention(q, k, v, layout, config, None, kernels)
        grads = torch.autograd.grad(out, (q, k, v), grad.to(out))
    return [x.detach().cpu() for x in (out, *grads)]


def _layout(device: torch.device) -> JaggedLayout:
    """Sequences of 0 to 300 tokens, which make several blocks and tiles."""
    return small_layout(device, (130, 0, 2, 297, 64), (9, 0, 1, 40, 0), num_contextuals=3, group_size=4)


def all_shapes() -> Iterator[KernelShapes]:
    """Every head dim and dtype that has kernels."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            yield KernelShapes(head_dim, 2, 2 * head_dim, head_dim, dtype)


if __name__ == "__main__":
    main(checks, all_shapes())
