"""Compares every Triton kernel with PyTorch: see :mod:`hstu.ops.self_check`.

``python -m hstu.ops.triton.self_check`` compares them now, for many shapes, and prints the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.ops.functional import add_layer_norm, project_uvqk, projected_attention, projected_gate
from hstu.ops.kernels import (
    SLOTS,
    AddLayerNormInputs,
    AddLayerNormKernels,
    AttentionConfig,
    AttentionKernels,
    GateConfig,
    GateKernels,
    KernelShapes,
    Negatives,
    RelativeBias,
    SeenItems,
)
from hstu.ops.layout import NUM_TIME_BUCKETS, TokenOrder
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import Check, Checks, Errors, largest_error, main, same_bits, small_layout
from hstu.ops.triton.operators import OPERATORS
from hstu.ops.triton.slots import SlotIndex, start_rows
from hstu.ops.triton.support import unsupported_reason

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
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
    tolerance: float | None = None
    """None: that of the dtype of the first argument."""


def checks(device: torch.device, shapes: KernelShapes | None) -> Checks:
    """All kernels that serve these shapes, in the configuration that runs on this device.

    ``shapes``: None: the kernels of dynamic tables.
    """
    if shapes is None:
        yield Check(SLOTS, "slots of dynamic tables", partial(_slots_errors, device))
        return
    for operator, case in _cases(device, shapes):
        if unsupported_reason(operator, shapes) is None:
            yield Check(operator, case.name, partial(_errors, case, device))


def _errors(case: Case, device: torch.device) -> Errors:
    """The largest error of the output and the gradients, and whether a repeat differs.

    The reference runs in float64 on the CPU.
    """
    dtype = case.leaves[0].dtype
    exact = _results(case.reference, case.leaves, torch.float64, torch.device("cpu"))
    ours, again = (_results(case.kernel, case.leaves, None, device) for _ in range(2))
    error = largest_error([x.double() for x in ours], exact)
    differs = float(not same_bits(ours, again))
    return {case.name: (error, case.tolerance or TOLERANCE[dtype]), f"{case.name}, repeated": (differs, 0.0)}


def _results(
    function: Function, leaves: Sequence[Tensor], dtype: torch.dtype | None, device: torch.device
) -> list[Tensor]:
    """The output and the gradients, on the CPU."""
    with torch.enable_grad():
        inputs = [leaf.detach().to(device, dtype).requires_grad_() for leaf in leaves]
        out = function(*inputs)
        slope = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(leaves[0].dtype)
        grads = torch.autograd.grad(out, inputs, slope.to(device, out.dtype))
    return [x.detach().cpu() if dtype is None else x.detach() for x in (out, *grads)]


def _cases(device: torch.device, shapes: KernelShapes) -> Iterator[tuple[str, Case]]:
    """The operator and the case; the inputs are the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cases = [("attention", _attention_case(device, shapes, **mask)) for mask in MASKS]
        if shapes.has_window:
            cases += [("attention", _attention_case(device, shapes, **mask, **WINDOW)) for mask in MASKS]
        cases += [*_row_cases(device, shapes), *_loss_cases(shapes)]
    yield from cases


MASKS: tuple[dict[str, Any], ...] = ({"is_causal": True}, {"is_causal": False})
WINDOW = {"max_span": 20, "full_tokens": 9}


def _attention_case(device: torch.device, shapes: KernelShapes, **mask: Any) -> Case:
    width, dtype, has_bias = shapes.head_dim, shapes.dtype, shapes.has_bias
    layouts = {place: small_layout(torch.device(place)) for place in {device.type, "cpu"}}
    config = AttentionConfig(alpha=width**-0.5, scaling_seqlen=50, **mask)
    tables = [torch.randn(size) for size in (99, NUM_TIME_BUCKETS)] if has_bias else []
    projected = torch.randn(layouts["cpu"].num_tokens, 2, 3, width).to(dtype)

    def of(kernels: AttentionKernels) -> Function:
        return lambda projected, shift, *tables: projected_attention(
            projected, shift, layouts[shift.device.type], config, RelativeBias(*tables) if tables else None, kernels
        )

    leaves = [projected, torch.zeros(2, 3, width), *tables]
    kinds = "causal" if config.is_causal else "bidirectional", "bias" if has_bias else "no bias"
    window = "" if config.max_span is None else ", window"
    name = f"attention ({width} channels, {str(dtype).removeprefix('torch.')}, {', '.join(kinds)}{window})"
    return Case(name, of(OPERATORS["attention"]), of(REFERENCE_KERNELS.attention), leaves)


def _row_cases(device: torch.device, shapes: KernelShapes) -> Iterator[tuple[str, Case]]:
    width, inner, gate = shapes.hidden_size, shapes.num_heads * shapes.head_dim, GateConfig(1e-5, 0.0)

    def gate_of(kernels: GateKernels) -> Function:
        return lambda x, u, shift, weight, bias: projected_gate(x, u, shift, weight, bias, gate, kernels)

    heads = [torch.randn(70, shapes.num_heads, shapes.head_dim).to(shapes.dtype) for _ in range(2)]
    yield (
        "norm_mul_dropout",
        Case(
            "norm_mul_dropout",
            gate_of(OPERATORS["norm_mul_dropout"]),
            gate_of(REFERENCE_KERNELS.norm_mul_dropout),
            [*heads, torch.zeros(shapes.num_heads, shapes.head_dim), *(torch.randn(inner) for _ in range(2))],
        ),
    )
    x, affine = torch.randn(70, width), [torch.randn(width) for _ in range(2)]
    update = torch.randn(70, width).to(shapes.dtype)

    def add_norm(kernels: AddLayerNormKernels) -> Function:
        def function(x: Tensor, weight: Tensor, bias: Tensor, update: Tensor | None = None) -> Tensor:
            return torch.cat(add_layer_norm(AddLayerNormInputs(x, update, weight, bias, 1e-5, torch.float32), kernels))

        return function

    fused, plain = add_norm(OPERATORS["add_layer_norm"]), add_norm(REFERENCE_KERNELS.add_layer_norm)
    for residual in dict.fromkeys((torch.float32, shapes.dtype)):
        name = f"add_layer_norm ({str(residual).removeprefix('torch.')} residual)"
        leaves = [x.to(residual), *affine]
        yield "add_layer_norm", Case(f"{name}, first layer", fused, plain, leaves)
        yield "add_layer_norm", Case(name, fused, plain, [*leaves, update], TOLERANCE[shapes.dtype])
    linear = nn.Linear(width, 4 * inner)
    yield (
        "project_uvqk",
        Case(
            f"project_uvqk ({width} → {4 * inner}, {str(shapes.dtype).removeprefix('torch.')})",
            lambda x, weight, bias: project_uvqk(x, weight, bias, OPERATORS["project_uvqk"]),
            lambda *tensors: F.silu(F.linear(*tensors)),
            [tensor.detach().to(shapes.dtype) for tensor in (x, linear.weight, linear.bias)],
        ),
    )
    positions = torch.randint(40, (70,))
    yield (
        "add_positions",
        Case(
            "add_positions",
            lambda x, table: OPERATORS["add_positions"](x, table, positions.to(device)),
            lambda x, table: REFERENCE_KERNELS.add_positions(x, table, positions),
            [x, torch.randn(30, width)],
        ),
    )
    order = torch.randperm(70)
    inverse = order.argsort()
    yield (
        "jagged_concat",
        Case(
            "jagged_concat",
            lambda *parts: OPERATORS["jagged_concat"](parts, TokenOrder(order.to(device), inverse.to(device))),
            lambda *parts: REFERENCE_KERNELS.jagged_concat(parts, TokenOrder(order, inverse)),
            [torch.randn(rows, width) for rows in (3, 67)],
        ),
    )


def _loss_cases(shapes: KernelShapes) -> Iterator[tuple[str, Case]]:
    vectors = [F.normalize(torch.randn(rows, shapes.item_dim), dim=1) for rows in (90, 90, 70)]
    targets, ids, log_weights, draws = (
        torch.randint(70, (90,)),
        torch.arange(70),
        torch.randn(70).masked_fill(torch.rand(70) < 0.2, -torch.inf),
        torch.randint(70, (90, 37)),
    )

    places = torch.arange(90, dtype=torch.int32)
    first = torch.randint(-1, 180, (2, 70), dtype=torch.int32)

    def applied(function: Function, of_draws: bool, masks: bool) -> Function:
        def run(*tensors: Tensor) -> Tensor:
            count, to = len(tensors[0]), partial(torch.Tensor.to, device=tensors[0].device)
            seen = SeenItems(*map(to, (first, places[:count] % 2, places[:count]))) if masks else None
            drawn = to(draws[:count]) if of_draws else None
            return function(*tensors, Negatives(to(targets[:count]), to(ids), 0.1, to(log_weights), seen, drawn))

        return run

    few = [vectors[0][:20], vectors[1][:20], vectors[2]]  # one program per query: more queries show no more
    for name, leaves in (("pool_softmax_loss", vectors), ("sampled_softmax_loss", few)):
        for masks in (False, True):
            kernel, reference = (
                applied(function, leaves is few, masks)
                for function in (OPERATORS[name], getattr(REFERENCE_KERNELS, name))
            )
            yield name, Case(f"{name}{', seen items masked' if masks else ''}", kernel, reference, leaves)


def _slots_errors(device: torch.device) -> Errors:
    """The share of keys that are not found where they were put, while slots change keys; and of rows that are wrong."""
    capacity, wrong = 500, 0.0
    keys = torch.zeros(capacity, dtype=torch.int64, device=device)
    index, size = SlotIndex(keys), torch.full_like(keys[:1], capacity)
    slots = torch.arange(capacity, device=device)
    for step in range(3, 12):
        changed = slots[:: 1 + step % 3]
        former = keys[changed]
        keys[changed] = (changed * 16 + step) * 0x61C8864680B583EB
        index.insert(changed, size)
        differ = torch.cat([index.find(keys) != slots, index.find(former) != -1])
        wrong = max(wrong, float(differ.double().mean()))
    rows = torch.ones(capacity, 5, device=device)
    start_rows(rows, slots, size - 1)
    return {
        "slots of dynamic tables": (wrong, 0.0),
        "rows of dynamic tables": (float((rows.sum(1) != 5 * (slots == capacity - 1)).sum()), 0.0),
    }


def all_shapes() -> Iterator[KernelShapes | None]:
    """Shapes of models that between them use every width of tiles, every dtype and a relative bias.

    Those of the benchmark (bfloat16, 256 channels) come first.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (256, 128, 64, 50, 16):
            for has_bias in (False, True):
                yield KernelShapes(head_dim, 2, 2 * head_dim, head_dim, dtype, has_bias, has_window=True)
    yield None


if __name__ == "__main__":
    main(checks, all_shapes())
