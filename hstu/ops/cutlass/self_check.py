"""Compares every CUTLASS kernel with PyTorch: see :mod:`hstu.ops.self_check`.

``python -m hstu.ops.cutlass.self_check`` compares them now and prints the errors.
"""

from __future__ import annotations

from pathlib import Path

import cutlass
import torch

from hstu.ops.cutlass.operators import OPERATORS
from hstu.ops.cutlass.support import HEAD_DIMS
from hstu.ops.functional import hstu_attention
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import check_gpu_kernels, print_errors, small_layout
from hstu.ops.types import AttentionConfig, JaggedLayout

TOLERANCE = 1e-2
"""Largest norm of the error relative to the norm of the reference: above the rounding of 16-bit types, far below a
defect."""
MASKS = ((True, True), (True, False), (False, True))
"""is_causal, contextual_mask."""


def check_kernels(device: torch.device) -> None:
    """Compare the kernels if this machine has not done so before. Most of the time goes into compiling them.

    Raises:
        KernelsDisagree: a kernel is wrong.
    """
    check_gpu_kernels("CUTLASS", Path(__file__).parent, cutlass.__version__, device, kernel_errors)


def kernel_errors(device: torch.device) -> dict[str, tuple[float, float]]:
    """The error of O, dQ, dK and dV for each head dim, dtype and mask, relative to the norm, and the tolerance."""
    errors: dict[str, tuple[float, float]] = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for head_dim in HEAD_DIMS:
            for dtype in (torch.bfloat16, torch.float16):
                for mask in MASKS if dtype == torch.bfloat16 else MASKS[:1]:
                    errors |= _errors(device, head_dim, dtype, AttentionConfig(head_dim**-0.5, 100, *mask))
    return errors


def _errors(
    device: torch.device, head_dim: int, dtype: torch.dtype, config: AttentionConfig
) -> dict[str, tuple[float, float]]:
    """Errors for one configuration. As in the model, q, k and v are views of one tensor.

    The reference runs in float64 on the CPU.
    """
    cpu = torch.device("cpu")
    layout = _layout(cpu)
    uvqk = torch.randn(layout.num_tokens, 2, 4, head_dim).to(dtype)
    grad = torch.randn(layout.num_tokens, 2, head_dim).to(dtype)
    results = []
    for given, of_batch, kernels in (
        (uvqk.to(device), _layout(device), OPERATORS["attention"]),
        (uvqk.double(), layout, REFERENCE_KERNELS.attention),
    ):
        q, k, v = (part.requires_grad_() for part in given.unbind(2)[1:])
        out = hstu_attention(q, k, v, of_batch, config, None, kernels)
        results.append([x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, (q, k, v), grad.to(out)))])
    mask = ", ".join(
        ("causal" if config.is_causal else "bidirectional", f"{'' if config.contextual_mask else 'no '}contextual mask")
    )
    case = f"{head_dim} channels, {str(dtype).removeprefix('torch.')}, {mask}"
    return {
        f"{name} ({case})": (float((ours - exact).norm() / exact.norm()), TOLERANCE)
        for name, ours, exact in zip(("attention", "dQ", "dK", "dV"), *results, strict=True)
    }


def _layout(device: torch.device) -> JaggedLayout:
    """Sequences of 0 to 300 tokens, which make several blocks and tiles."""
    return small_layout(device, (130, 0, 2, 297, 64), (9, 0, 1, 40, 0), num_contextuals=3, group_size=4)


if __name__ == "__main__":
    print_errors(kernel_errors)
