"""The kernels are compared with PyTorch once on a machine before they are used: compilers and GPUs differ.

python -m hstu.ops.cutlass.self_check    check now, whatever has been checked before, and print the errors
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import cutlass
import numpy as np
import torch

from hstu.ops.attention import AttentionRule, attend
from hstu.ops.cache import cache_directory
from hstu.ops.cutlass import attention as kernels
from hstu.ops.cutlass.coverage import HEAD_DIMS
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.pytorch import attention as reference
from hstu.ops.self_check import KernelsDisagree, gpu_key, remember

log = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Error relative to the norm of what is right: above the rounding of 16-bit types, far below a defect."""
MASKS = ((True, True), (True, False), (False, True))
"""is_causal, contextual_mask."""


def check_kernels(device: torch.device) -> None:
    """Compare the kernels with PyTorch if that has not been done on this machine. Mostly the time to compile them.

    Raises KernelsDisagree where a kernel is wrong, with the numbers.
    """
    key = gpu_key(Path(__file__).parent, device, [cutlass.__version__])
    passed = cache_directory() / f"cutlass_kernels_{key}.checked"
    if passed.exists():
        return
    begun = time.monotonic()
    errors = kernel_errors(device)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise KernelsDisagree(
                f"the CUTLASS kernel of {name} differs from PyTorch by {error:.2g} of its norm, more than {TOLERANCE}; "
                "please report that, with the versions of nvidia-cutlass-dsl and of the driver"
            )
    log.info("CUTLASS kernels agree with PyTorch to %.1g (checked in %.1f s)", max(errors.values()),
             time.monotonic() - begun)  # fmt: skip
    remember(passed)


def kernel_errors(device: torch.device) -> dict[str, float]:
    """The error of O, dQ, dK and dV by head dim, type and mask, relative to the norm."""
    errors: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for head_dim in HEAD_DIMS:
            for dtype in (torch.bfloat16, torch.float16):
                masks = MASKS if dtype == torch.bfloat16 else MASKS[:1]
                for is_causal, contextual_mask in masks:
                    rule = AttentionRule(head_dim**-0.5, 100, is_causal, contextual_mask)
                    errors |= _errors(device, head_dim, dtype, rule)
    return errors


def _errors(device: torch.device, head_dim: int, dtype: torch.dtype, rule: AttentionRule) -> dict[str, float]:
    """The inputs are slices of one tensor, as in the model; the reference runs in float64 on the CPU."""
    layout = small_layout(device)
    uvqk = torch.randn(layout.num_tokens, 2, 4, head_dim).to(dtype)
    grad = torch.randn(layout.num_tokens, 2, head_dim).to(dtype)
    results = []
    for place in (device, torch.device("cpu")):
        on_device = uvqk.to(place) if place == device else uvqk.double()
        q, k, v = (part.requires_grad_() for part in on_device.detach().unbind(2)[1:])
        if place == device:
            out = attend(q, k, v, layout, rule, None, kernels)
        else:
            out = attend(q, k, v, small_layout(place), rule, None, reference)
        results.append([x.cpu().double() for x in (out, *torch.autograd.grad(out, (q, k, v), grad.to(out)))])
    mask = f"{'causal' if rule.is_causal else 'bidirectional'}, {'' if rule.contextual_mask else 'no '}contextual mask"
    return {
        f"{name} ({head_dim} channels, {str(dtype).removeprefix('torch.')}, {mask})": float(
            (ours - exact).norm() / exact.norm()
        )
        for name, ours, exact in zip(("attention", "dQ", "dK", "dV"), *results, strict=True)
    }


def small_layout(device: torch.device) -> JaggedLayout:
    """Sequences of none to 300 tokens, so of several blocks and tiles, with a context and with candidates."""
    items = np.array([130, 0, 2, 297, 64])
    return build_layout(
        item_lengths=items,
        num_sequences=len(items),
        num_contextuals=3,
        num_candidates=np.array([9, 0, 1, 40, 0]),
        tokens_per_item=1,
        target_group_size=4,
        device=device,
    )


def main() -> None:
    """Check now, and print."""
    for name, error in kernel_errors(torch.device("cuda", torch.cuda.current_device())).items():
        print(f"{'ok   ' if error <= TOLERANCE else 'WRONG'} {error:.1e} of {TOLERANCE:.0e}  {name}")


if __name__ == "__main__":
    main()
