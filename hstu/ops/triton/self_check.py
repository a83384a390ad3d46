"""Compares every Triton kernel with PyTorch: see :mod:`hstu.ops.self_check`.

``python -m hstu.ops.triton.self_check`` compares them now and prints the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from hstu.ops.functional import hstu_attention, layer_norm, norm_mul_dropout, project_uvqk
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import check_gpu_kernels, largest_error, print_errors, small_layout
from hstu.ops.triton.launch import first_configurations
from hstu.ops.triton.operators import OPERATORS
from hstu.ops.triton.slots import SlotIndex
from hstu.ops.types import NUM_TIME_BUCKETS, AttentionConfig, AttentionKernels, GateConfig, RelativeBias, TokenOrder

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference relative to the largest number: above the rounding of the type, far below a defect."""

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A kernel and its reference, compared by their output and by their gradients."""

    name: str
    kernel: Function
    reference: Function
    leaves: Sequence[Tensor]
    """Arguments of both functions, on the CPU. Gradients are taken with respect to them."""


def check_kernels(device: torch.device) -> None:
    """Compare the kernels if this machine has not done so before. Takes some seconds, mostly for compiling them.

    Raises:
        KernelsDisagree: a kernel is wrong.
    """
    check_gpu_kernels("Triton", Path(__file__).parent, triton.__version__, device, kernel_errors)


def kernel_errors(device: torch.device) -> dict[str, tuple[float, float]]:
    """For each case its error, relative to the largest number, and the tolerance."""
    errors = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), first_configurations():
        torch.manual_seed(0)
        for case in _cases(device):
            errors[case.name] = _error(case, device), TOLERANCE[case.leaves[0].dtype]
        errors["slots of dynamic tables"] = _slots_error(device), 0.0
    return errors


def _error(case: Case, device: torch.device) -> float:
    """The largest error of the output and the gradients. The reference runs in float64 on the CPU."""
    results = []
    for function, dtype, place in ((case.kernel, None, device), (case.reference, torch.float64, torch.device("cpu"))):
        leaves = [leaf.detach().to(place, dtype).requires_grad_() for leaf in case.leaves]
        out = function(*leaves)
        slope = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(case.leaves[0].dtype)
        grads = torch.autograd.grad(out, leaves, slope.to(place, out.dtype))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    return largest_error(*results)


def _cases(device: torch.device) -> Iterator[Case]:
    yield _attention_case(device, 64, torch.float32, is_causal=True, has_bias=True)
    yield _attention_case(device, 50, torch.bfloat16, is_causal=False, has_bias=True)
    yield _attention_case(device, 128, torch.bfloat16, is_causal=True, has_bias=False)
    yield _attention_case(device, 256, torch.bfloat16, is_causal=True, has_bias=False)
    yield from _row_cases(device)
    yield from _loss_cases(device)


def _attention_case(device: torch.device, width: int, dtype: torch.dtype, is_causal: bool, has_bias: bool) -> Case:
    layouts = {place: small_layout(torch.device(place)) for place in {device.type, "cpu"}}
    config = AttentionConfig(alpha=width**-0.5, scaling_seqlen=50, is_causal=is_causal)
    tables = [torch.randn(size) for size in (99, NUM_TIME_BUCKETS)] if has_bias else []
    heads = [torch.randn(layouts["cpu"].num_tokens, 2, width).to(dtype) for _ in range(3)]

    def of(kernels: AttentionKernels) -> Function:
        return lambda q, k, v, *tables: hstu_attention(
            q, k, v, layouts[q.device.type], config, RelativeBias(*tables) if tables else None, kernels
        )

    mask, bias = "causal" if is_causal else "bidirectional", "bias" if has_bias else "no bias"
    name = f"attention ({width} channels, {str(dtype).removeprefix('torch.')}, {mask}, {bias})"
    return Case(name, of(OPERATORS["attention"]), of(REFERENCE_KERNELS.attention), [*heads, *tables])


def _row_cases(device: torch.device) -> Iterator[Case]:
    x, u = (torch.randn(70, 3, 17) for _ in range(2))
    affine, gate = [torch.randn(51) for _ in range(2)], GateConfig(1e-5, 0.0)
    yield Case(
        "norm_mul_dropout",
        lambda x, u, weight, bias: norm_mul_dropout(x, u, weight, bias, gate, OPERATORS["norm_mul_dropout"]),
        lambda x, u, weight, bias: norm_mul_dropout(x, u, weight, bias, gate, REFERENCE_KERNELS.norm_mul_dropout),
        [x, u, *affine],
    )
    yield Case(
        "layer_norm",
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5, None, OPERATORS["layer_norm"]),
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5),
        [x.flatten(1), *affine],
    )
    linear = nn.Linear(51, 3 * 4 * 17)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(
            f"uvqk ({str(dtype).removeprefix('torch.')})",
            lambda x, weight, bias: project_uvqk(x, weight, bias, OPERATORS["project_uvqk"]),
            lambda *tensors: F.silu(F.linear(*tensors)),
            [tensor.detach().to(dtype) for tensor in (x.flatten(1), linear.weight, linear.bias)],
        )
    positions = torch.randint(40, (70,))
    yield Case(
        "add_positions",
        lambda x, table: OPERATORS["add_positions"](x, table, positions.to(device)),
        lambda x, table: REFERENCE_KERNELS.add_positions(x, table, positions),
        [x.flatten(1), torch.randn(30, 51)],
    )
    order = torch.randperm(70)
    inverse = order.argsort()
    yield Case(
        "jagged_concat",
        lambda *parts: OPERATORS["jagged_concat"](parts, TokenOrder(order.to(device), inverse.to(device))),
        lambda *parts: REFERENCE_KERNELS.jagged_concat(parts, TokenOrder(order, inverse)),
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

    def applied(function: Function, *rest: Tensor) -> Function:
        return lambda *tensors: function(*tensors, *(x.to(tensors[0].device) for x in rest), 0.1)

    for name, rest in {
        "pool_softmax_loss": (targets, ids, valid),
        "sampled_softmax_loss": (draws, targets, ids),
    }.items():
        kernel, reference = OPERATORS[name], getattr(REFERENCE_KERNELS, name)
        yield Case(name, applied(kernel, *rest), applied(reference, *rest), vectors)


def _slots_error(device: torch.device) -> float:
    """The larger of the shares of wrong slots and wrong scores, after a third of the ids have been erased."""
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


if __name__ == "__main__":
    print_errors(kernel_errors)
