"""Compares every CUTLASS kernel with PyTorch: see :mod:`hstu.ops.self_check`.

``python -m hstu.ops.cutlass.self_check`` compares them now and prints the errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from hstu.ops.cutlass.operators import OPERATORS
from hstu.ops.cutlass.support import BIAS_HEAD_DIMS, DTYPES, HEAD_DIMS, unsupported_reason
from hstu.ops.functional import projected_attention
from hstu.ops.kernels import AttentionConfig, AttentionKernels, KernelShapes, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import Check, Checks, Errors, main, same_bits, small_layout

TOLERANCE = 1e-2
"""Largest norm of the error relative to the norm of the reference: above the rounding of 16-bit types, far below a
defect."""
MASKS = ((True, True), (True, False), (False, True))
"""is_causal, contextual_mask."""
WEIGHTS = (2 * 200 - 1, NUM_TIME_BUCKETS)
"""Sizes of the weights of a bias: for fewer positions than the longest sequence has."""


def checks(device: torch.device, shapes: KernelShapes | None) -> Checks:
    """The kernels for the head dim and dtype of a model, with every mask; none if Triton serves these shapes."""
    if shapes is None or unsupported_reason("attention", shapes) is not None:
        return
    head_dim, dtype, has_bias = shapes.head_dim, shapes.dtype, shapes.has_bias
    for is_causal, contextual_mask in MASKS:
        config = AttentionConfig(head_dim**-0.5, 100, is_causal, contextual_mask)
        mask = f"{'causal' if is_causal else 'bidirectional'}, {'' if contextual_mask else 'no '}contextual mask"
        kind = f"{str(dtype).removeprefix('torch.')}{', relative bias' if has_bias else ''}"
        case = f"{head_dim} channels, {kind}, {mask}"
        yield Check("attention", f"attention ({case})", partial(_errors, case, device, shapes, config))


def _errors(case: str, device: torch.device, shapes: KernelShapes, config: AttentionConfig) -> Errors:
    """The errors of O and of all gradients relative to the norm, and whether repeats differ.

    As in the model, q, k and v are the SiLU of views of one tensor. The reference runs in float64 on the CPU.
    """
    cpu, head_dim, dtype = torch.device("cpu"), shapes.head_dim, shapes.dtype
    layout = _layout(cpu)
    generator = torch.Generator().manual_seed(0)
    uvqk = torch.randn(layout.num_tokens, 2, 4, head_dim, generator=generator).to(dtype)
    grad = torch.randn(layout.num_tokens, 2, head_dim, generator=generator).to(dtype)
    weights = [torch.randn(size, generator=generator) for size in WEIGHTS] if shapes.has_bias else []
    on_device = partial(_results, uvqk.to(device), weights, grad, _layout(device), config, OPERATORS["attention"])
    ours, repeated = on_device(), on_device()
    doubled = [weight.double() for weight in weights]
    exact = _results(uvqk.double(), doubled, grad, layout, config, REFERENCE_KERNELS.attention)
    results = "attention", "dQ", "dK", "dV", "sums of gradients", "d position", "d time"
    names = [f"{name} ({case})" for name in results[: len(exact)]]
    errors = [float((each.double() - of).norm() / of.norm()) for each, of in zip(ours, exact, strict=True)]
    differs = {f"attention, repeated ({case})": (float(not same_bits(ours, repeated)), 0.0)}
    return {name: (error, TOLERANCE) for name, error in zip(names, errors, strict=True)} | differs


def _results(
    uvqk: Tensor,
    weights: list[Tensor],
    grad: Tensor,
    layout: JaggedLayout,
    config: AttentionConfig,
    kernels: AttentionKernels,
) -> list[Tensor]:
    """O, dQ, dK, dV, the sums of these three over tokens, and the gradients of the weights of a bias, on the CPU."""
    with torch.enable_grad():
        projected = uvqk[:, :, 1:].detach().requires_grad_()
        shift = torch.zeros(projected.shape[1:], device=uvqk.device, requires_grad=True)
        of_bias = [weight.to(uvqk.device).requires_grad_() for weight in weights]
        bias = RelativeBias(*of_bias) if of_bias else None
        out = projected_attention(projected, shift, layout, config, bias, kernels)
        of_projected, *others = torch.autograd.grad(out, [projected, shift, *of_bias], grad.to(out))
    of_v, of_q, of_k = of_projected.unbind(2)
    return [x.detach().cpu() for x in (out, of_q, of_k, of_v, *others)]


def _layout(device: torch.device) -> JaggedLayout:
    """Sequences of 0 to 300 tokens, which make several blocks and tiles."""
    return small_layout(device, (130, 0, 2, 297, 64), (9, 0, 1, 40, 0), num_contextuals=3, group_size=4)


def all_shapes() -> Iterator[KernelShapes]:
    """Every head dim and dtype that has kernels, without and with a relative bias; first those of the benchmark."""
    for has_bias, dtype in itertools.product((False, True), DTYPES):
        for head_dim in reversed(BIAS_HEAD_DIMS if has_bias else HEAD_DIMS):
            yield KernelShapes(head_dim, 2, 2 * head_dim, head_dim, dtype, has_bias)


if __name__ == "__main__":
    main(checks, all_shapes())
