"""The kernels are compared with PyTorch once on a machine before they are used: compilers and GPUs differ.

python -m hstu.ops.triton.self_check    check now, whatever has been checked before, and print the errors
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from hstu.ops.attention import AttentionKernels, AttentionRule, attend
from hstu.ops.backends import Backend
from hstu.ops.cache import cache_directory
from hstu.ops.jagged import TokenOrder
from hstu.ops.layer_norm import layer_norm
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.norm_mul_dropout import GateRule, norm_mul_dropout
from hstu.ops.pytorch import attention as reference_attention
from hstu.ops.pytorch import jagged as reference_jagged
from hstu.ops.pytorch import positions as reference_positions
from hstu.ops.pytorch import softmax_loss as reference_loss
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias
from hstu.ops.self_check import KernelsDisagree, gpu_key, remember
from hstu.ops.triton import attention
from hstu.ops.triton.jagged import jagged_concat
from hstu.ops.triton.launch import first_configurations
from hstu.ops.triton.positions import add_positions
from hstu.ops.triton.slots import SlotIndex
from hstu.ops.triton.softmax_loss import PoolSoftmaxLoss, SampledSoftmaxLoss
from hstu.ops.uvqk import project_uvqk

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference, relative to the largest number: above the rounding of the type, far below a defect."""

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A kernel, what it must equal, and the tensors (on the CPU) that both are differentiated by."""

    name: str
    kernel: Function
    reference: Function
    leaves: Sequence[Tensor]


def check_kernels(device: torch.device) -> None:
    """Compare what has not been compared on this machine before. Some seconds, most of which Triton compiles.

    Raises KernelsDisagree where a kernel is wrong, with the numbers.
    """
    key = gpu_key(Path(__file__).parent, device, [triton.__version__])
    passed = cache_directory() / f"triton_kernels_{key}.checked"
    if passed.exists():
        return
    begun = time.monotonic()
    errors = kernel_errors(device)
    for name, (error, tolerance) in errors.items():
        if not error <= tolerance:
            raise KernelsDisagree(
                f"the Triton kernel of {name} differs from PyTorch by {error:.2g} of the largest number, more than "
                f"{tolerance}; please report that, with the versions of Triton and of the driver"
            )
    worst = max(error / tolerance for error, tolerance in errors.values() if tolerance)
    log.info("Triton kernels agree with PyTorch to %.0f %% of the tolerance (checked in %.1f s)", 100 * worst,
             time.monotonic() - begun)  # fmt: skip
    remember(passed)


def kernel_errors(device: torch.device) -> dict[str, tuple[float, float]]:
    """The error of each case on ``device``, relative to the largest number, and what is tolerated."""
    errors = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), first_configurations():
        torch.manual_seed(0)
        for case in _cases(device):
            errors[case.name] = _error(case, device), TOLERANCE[case.leaves[0].dtype]
        errors["slots of dynamic tables"] = _slots_error(device), 0.0
    return errors


def _error(case: Case, device: torch.device) -> float:
    """Of outputs and gradients. The reference runs in float64 on the CPU."""
    results = []
    for function, dtype, place in (
        (case.kernel, None, device),
        (case.reference, torch.float64, torch.device("cpu")),
    ):
        leaves = [leaf.detach().to(place, dtype).requires_grad_() for leaf in case.leaves]
        out = function(*leaves)
        slope = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(case.leaves[0].dtype)
        grads = torch.autograd.grad(out, leaves, slope.to(place, out.dtype))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    errors = [float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in zip(*results, strict=True)]
    return float(np.max(errors))  # unlike max(), not blind to nan


def _cases(device: torch.device) -> Iterator[Case]:
    yield _attention_case(device, 64, torch.float32, is_causal=True, has_bias=True)
    yield _attention_case(device, 50, torch.bfloat16, is_causal=False, has_bias=True)
    yield _attention_case(device, 128, torch.bfloat16, is_causal=True, has_bias=False)
    yield _attention_case(device, 256, torch.bfloat16, is_causal=True, has_bias=False)
    yield from _row_cases(device)
    yield from _loss_cases(device)


def _attention_case(device: torch.device, width: int, dtype: torch.dtype, is_causal: bool, has_bias: bool) -> Case:
    layouts = {place: _layout(torch.device(place)) for place in {device.type, "cpu"}}
    rule = AttentionRule(alpha=width**-0.5, scaling_seqlen=50, is_causal=is_causal)
    tables = [torch.randn(size) for size in (99, NUM_TIME_BUCKETS)] if has_bias else []
    heads = [torch.randn(layouts["cpu"].num_tokens, 2, width).to(dtype) for _ in range(3)]

    def of(kernels: AttentionKernels) -> Function:
        return lambda q, k, v, *tables: attend(
            q, k, v, layouts[q.device.type], rule, RelativeBias(*tables) if tables else None, kernels
        )

    mask, bias = "causal" if is_causal else "bidirectional", "bias" if has_bias else "no bias"
    name = f"attention ({width} channels, {str(dtype).removeprefix('torch.')}, {mask}, {bias})"
    return Case(name, of(attention), of(reference_attention), [*heads, *tables])


def _row_cases(device: torch.device) -> Iterator[Case]:
    x, u = (torch.randn(70, 3, 17) for _ in range(2))
    affine = [torch.randn(51) for _ in range(2)]
    yield Case(
        "norm_mul_dropout",
        lambda x, u, weight, bias: norm_mul_dropout(x, u, weight, bias, GateRule(1e-5, 0.0), Backend.TRITON),
        lambda x, u, weight, bias: norm_mul_dropout(x, u, weight, bias, GateRule(1e-5, 0.0)),
        [x, u, *affine],
    )
    yield Case(
        "layer_norm",
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5, backend=Backend.TRITON),
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5),
        [x.flatten(1), *affine],
    )
    linear = nn.Linear(51, 3 * 4 * 17)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(
            f"uvqk ({str(dtype).removeprefix('torch.')})",
            lambda x, weight, bias: project_uvqk(x, weight, bias, Backend.TRITON),
            lambda *tensors: F.silu(F.linear(*tensors)),
            [tensor.detach().to(dtype) for tensor in (x.flatten(1), linear.weight, linear.bias)],
        )
    positions = torch.randint(40, (70,))
    yield Case(
        "add_positions",
        lambda x, table: add_positions(x, table, positions.to(device)),
        lambda x, table: reference_positions.add_positions(x, table, positions),
        [x.flatten(1), torch.randn(30, 51)],
    )
    order = torch.randperm(70)
    inverse = order.argsort()
    yield Case(
        "jagged_concat",
        lambda *parts: jagged_concat(parts, TokenOrder(order.to(device), inverse.to(device))),
        lambda *parts: reference_jagged.jagged_concat(parts, TokenOrder(order, inverse)),
        [torch.randn(rows, 51) for rows in (3, 67)],
    )


def _loss_cases(device: torch.device) -> Iterator[Case]:
    vectors = [F.normalize(torch.randn(rows, 40), dim=1) for rows in (90, 90, 70)]
    targets, ids, valid, draws = (
        torch.randint(70, (90,)),
        torch.arange(70),
        torch.rand(70) > 0.2,
        torch.randint(70, (90, 37)),
    )

    def applied(function: type[torch.autograd.Function], *rest: Tensor) -> Function:
        return lambda *tensors: function.apply(*tensors, *(x.to(tensors[0].device) for x in rest), 0.1)

    pool, sampled = (targets, ids, valid), (draws, targets, ids)
    yield Case(
        "pool_softmax_loss", applied(PoolSoftmaxLoss, *pool), applied(reference_loss.PoolSoftmaxLoss, *pool), vectors
    )
    yield Case(
        "sampled_softmax_loss",
        applied(SampledSoftmaxLoss, *sampled),
        applied(reference_loss.SampledSoftmaxLoss, *sampled),
        vectors,
    )


def _slots_error(device: torch.device) -> float:
    """Share of wrong slots, or of wrong scores, once some of those that had a slot have lost it."""
    capacity, extremes = 500, [0, -1, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max]
    ids = torch.cat([torch.tensor(extremes), torch.arange(2 * capacity - len(extremes)) * 7919 + 1])
    expected = torch.where(torch.arange(2 * capacity) < capacity, torch.arange(2 * capacity), -1)
    index, held = SlotIndex(capacity, device), ids[:capacity].to(device)
    index.insert(held, expected[:capacity].to(device))
    erased = torch.arange(1, capacity, 3)
    index.erase(held[erased.to(device)], erased.to(device))
    expected[erased] = -1
    scores = torch.zeros(capacity, dtype=torch.int64, device=device)
    found = index.count(ids.repeat(3).to(device), held, None, scores, 7, lfu=True)
    scored = torch.where(expected[:capacity] < 0, 0, (3 << 32) + 7)
    wrong = found.cpu() != expected.repeat(3), scores.cpu() != scored
    return max(float(each.double().mean()) for each in wrong)


def _layout(device: torch.device) -> JaggedLayout:
    """Sequences of 1 to 131 tokens, with a context and with candidates, a second to months apart."""
    items = np.array([1, 40, 130, 17])
    gaps = np.exp(np.random.default_rng(0).uniform(0, 16, int(items.sum()))).astype(np.int64)
    return build_layout(
        item_lengths=items,
        num_sequences=len(items),
        num_contextuals=1,
        num_candidates=np.array([0, 5, 0, 3]),
        tokens_per_item=1,
        target_group_size=2,
        device=device,
        item_times=torch.from_numpy(np.cumsum(gaps)).to(device),
    )


def main() -> None:
    """Check now, and print."""
    for name, (error, tolerance) in kernel_errors(torch.device("cuda", torch.cuda.current_device())).items():
        print(f"{'ok   ' if error <= tolerance else 'WRONG'} {error:.1e} of {tolerance:.0e}  {name}")


if __name__ == "__main__":
    main()
