"""Self check of kernels: compare them with PyTorch in float64 once per machine, before their first use.

A defect in a compiler or driver would silently train a wrong model. All backends share one table of cases.
``check_process.py`` runs it and caches the results, and tests/ops/test_self_check.py runs it for more shapes.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.compile_ahead import Job
from hstu.ops.functional import add_layer_norm, hstu_attention, norm_mul_dropout, project_uvqk, softmax_loss
from hstu.ops.kernels import (
    SLOTS,
    AddLayerNormInputs,
    AttentionConfig,
    AttentionInputs,
    Backend,
    GateConfig,
    GateInputs,
    KernelShapes,
    Negatives,
    RelativeBias,
    SeenItems,
    SoftmaxLoss,
)
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout, TokenOrder, build_layout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import RowUpdate
from hstu.ops.support import unsupported_reason

Errors = dict[str, tuple[float, float]]
"""Comparison → relative error, and the largest error that rounding explains."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference relative to the largest number: above the rounding of the dtype, far below a defect."""
NORM_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest norm of the error relative to the norm of the reference; rounding alone causes half of it."""
CPU_HEAD_DIMS = (24, 80, 200)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"is_causal": False},
    "no contextual mask": {"contextual_mask": False},
}
WINDOWS: dict[str, dict[str, Any]] = {"whole": {}, "window": {"max_span": 20, "full_tokens": 9}}
ITEMS, CANDIDATES = (130, 0, 2, 297, 64), (9, 0, 1, 40, 0)
"""Lengths of the attention sequences, which span several blocks and tiles."""


class Check(NamedTuple):
    """A case of the self check. The cases of one operator are consecutive."""

    operator: str  # A name of hstu.ops.kernels.OPERATORS, or SLOTS
    case: str
    measure: Callable[[], Errors]


class Case(NamedTuple):
    """An operator and the tensors by which it is differentiated."""

    operator: str
    name: str
    function: Callable[..., Tensor]  # Of the kernels of a backend and of ``leaves`` on any device
    leaves: Sequence[Tensor]  # On the CPU
    dtype: torch.dtype  # Decides the tolerance


def checks(backend: str, device: torch.device, shapes: KernelShapes | None) -> Iterator[Check]:
    """Checks of all kernels of a backend that serve these shapes; None: of dynamic tables."""
    if shapes is None:
        if backend == Backend.TRITON:
            yield Check(SLOTS, "slots of dynamic tables", partial(slots_errors, device))
        return
    kernels = importlib.import_module(f"hstu.ops.{backend}.operators").OPERATORS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        all_cases = list(cases(shapes))
    for case in all_cases:
        if unsupported_reason(Backend(backend), case.operator, shapes) is None:
            yield Check(case.operator, case.name, partial(errors, case, kernels[case.operator], device))


def jobs(backend: str, shapes: KernelShapes | None, capability: int, operators: Sequence[str]) -> list[Job]:
    """Compile jobs of the kernels that the checks of these operators launch on a GPU."""
    module = "cutlass.attention" if backend == Backend.CUTLASS else f"{backend}.compile_ahead"
    return list(importlib.import_module(f"hstu.ops.{module}").jobs(shapes, capability, operators))


def errors(case: Case, kernels: Any, device: torch.device) -> Errors:
    """Largest error of the output and of the gradients, and whether a second run has different bits."""
    exact = _results(case, getattr(REFERENCE_KERNELS, case.operator), torch.float64)
    ours, again = (_results(case, kernels, None, device) for _ in range(2))
    differences = [(mine.double() - right, right) for mine, right in zip(ours, exact, strict=True)]
    largest = [float(difference.abs().max() / right.abs().max()) for difference, right in differences]
    # np.max returns nan if an error is nan; max() may not
    found = {case.name: (float(np.max(largest)), TOLERANCE[case.dtype])}
    if case.dtype in NORM_TOLERANCE:
        norms = [float(difference.norm() / right.norm()) for difference, right in differences]
        found[f"{case.name}, norm"] = float(np.max(norms)), NORM_TOLERANCE[case.dtype]
    return {**found, f"{case.name}, repeated": (float(not all(map(torch.equal, ours, again))), 0.0)}


def _results(case: Case, kernels: Any, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> list[Tensor]:
    with torch.enable_grad():
        inputs = [leaf.detach().to(device, dtype).requires_grad_() for leaf in case.leaves]
        out = case.function(kernels, *inputs)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        slope = slope.to(case.leaves[0].dtype)
        grads = torch.autograd.grad(out, inputs, slope.to(device, out.dtype))
    return [x.detach().cpu() for x in (out, *grads)]


def cases(shapes: KernelShapes) -> Iterator[Case]:
    """Cases of all operators at these shapes."""
    for window in WINDOWS if shapes.has_window else ("whole",):
        for mask in MASKS:
            yield _attention_case(shapes, mask, window)
    yield from _row_cases(shapes)
    yield from _loss_cases(shapes)
    yield Case("update_rows", "update_rows", _train_rows, [torch.randn(40, 21)], torch.float32)


def _attention_case(shapes: KernelShapes, mask: str, window: str) -> Case:
    """The bias is for fewer positions than the longest sequence has."""
    width, dtype = shapes.head_dim, shapes.dtype
    config = AttentionConfig(alpha=width**-0.5, scaling_seqlen=50, **MASKS[mask], **WINDOWS[window])
    tables = [torch.randn(size) for size in (99, NUM_TIME_BUCKETS)] if shapes.has_bias else []
    layout_on = partial(small_layout, num_items=ITEMS, num_candidates=CANDIDATES, num_contextuals=3, group_size=4)
    num_tokens = layout_on(torch.device("cpu")).num_tokens
    parts = [torch.randn(num_tokens, 2, width).to(dtype) for _ in range(3)]

    def run(kernels: Any, v: Tensor, q: Tensor, k: Tensor, shift: Tensor, *tables: Tensor) -> Tensor:
        bias = RelativeBias(*tables) if tables else None
        return hstu_attention(AttentionInputs(q, k, v, layout_on(v.device), config, bias), kernels, shift)

    words = [f"{width} channels", str(dtype).removeprefix("torch."), mask, window, *(["bias"] if tables else [])]
    leaves = [*parts, torch.zeros(2, 3, width), *tables]
    return Case("attention", f"attention ({', '.join(words)})", run, leaves, dtype)


def _row_cases(shapes: KernelShapes) -> Iterator[Case]:
    width, inner, dtype = shapes.hidden_size, shapes.num_heads * shapes.head_dim, shapes.dtype
    heads = [torch.randn(70, shapes.num_heads, shapes.head_dim).to(dtype) for _ in range(2)]
    x, affine, update = torch.randn(70, width), [torch.randn(width) for _ in range(2)], torch.randn(70, width).to(dtype)

    def add_norm(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor, update: Tensor | None = None) -> Tensor:
        norm_dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.cat(add_layer_norm(AddLayerNormInputs(x, update, weight, bias, 1e-5, norm_dtype), kernels))

    for residual in dict.fromkeys((torch.float32, dtype)):
        name, leaves = f"add_layer_norm ({str(residual).removeprefix('torch.')} residual", [x.to(residual), *affine]
        yield Case("add_layer_norm", f"{name}, first layer)", add_norm, leaves, residual)
        yield Case("add_layer_norm", f"{name})", add_norm, [*leaves, update], dtype)

    def gate(kernels: Any, x: Tensor, u: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_mul_dropout(GateInputs(x, u, weight, bias, GateConfig(1e-5, 0.0)), kernels, shift)

    weights = [torch.zeros(shapes.num_heads, shapes.head_dim), *(torch.randn(inner) for _ in range(2))]
    yield Case("norm_mul_dropout", "norm_mul_dropout", gate, [*heads, *weights], dtype)
    projection = [torch.randn(4 * inner, width) / width**0.5, torch.randn(4 * inner)]
    yield Case(
        "project_uvqk",
        f"project_uvqk ({width} → {4 * inner})",
        lambda kernels, x, weight, bias: project_uvqk(x, weight, bias, kernels),
        [tensor.to(dtype) for tensor in (x, *projection)],
        dtype,
    )
    positions, source = torch.randint(40, (70,)), torch.randperm(70)
    order = source, source.argsort()
    yield Case(
        "add_positions",
        "add_positions",
        lambda kernel, x, table: kernel(x, table, positions.to(x.device)),
        [x, torch.randn(30, width)],
        torch.float32,
    )
    yield Case(
        "jagged_concat",
        "jagged_concat",
        lambda kernel, *parts: kernel(parts, TokenOrder(*(each.to(parts[0].device) for each in order))),
        [torch.randn(rows, width) for rows in (3, 67)],
        torch.float32,
    )


def _loss_cases(shapes: KernelShapes) -> Iterator[Case]:
    rows = torch.randn(30, shapes.item_dim)
    yield Case("l2_normalize", "l2_normalize", lambda kernel, rows: kernel(rows, 1e-6), [rows], torch.float32)
    vectors = [F.normalize(torch.randn(rows, shapes.item_dim), dim=1) for rows in (90, 90, 70)]
    few = [vectors[0][:20], vectors[1][:20], vectors[2]]  # one program per query: more queries test nothing new
    targets, ids, draws = torch.randint(70, (90,)), torch.arange(70), torch.randint(70, (90, 37))
    log_weights = torch.randn(70).masked_fill(torch.rand(70) < 0.2, -torch.inf)
    indices = torch.arange(90, dtype=torch.int32)
    first = torch.randint(-1, 180, (2, 70), dtype=torch.int32)

    def loss(
        is_drawn: bool, is_masked: bool, kernel: SoftmaxLoss, queries: Tensor, positives: Tensor, pool: Tensor
    ) -> Tensor:
        count, to = len(queries), partial(torch.Tensor.to, device=queries.device)
        seen = SeenItems(*map(to, (first, indices[:count] % 2, indices[:count]))) if is_masked else None
        drawn = to(draws[:count]) if is_drawn else None
        negatives = Negatives(to(targets[:count]), to(ids), 0.1, to(log_weights), seen, drawn)
        return softmax_loss(queries, positives, pool, negatives, kernel)

    for name, leaves in (("pool_softmax_loss", vectors), ("sampled_softmax_loss", few)):
        for is_masked in (False, True):
            text = f"{name}, seen items masked" if is_masked else name
            yield Case(name, text, partial(loss, leaves is few, is_masked), leaves, torch.float32)


def _train_rows(kernel: Any, gradients: Tensor) -> Tensor:
    """A table and its states after an Adam step on some rows, plus a term that makes the case differentiable."""
    rows = (torch.arange(len(gradients)) * 7 % 30)[None]
    gradient = torch.sparse_coo_tensor(rows, gradients.detach(), (50, gradients.shape[1]), check_invariants=True)
    tables = torch.ones(3, 50, gradients.shape[1], dtype=gradients.dtype)
    kernel(gradient, tables[0], tables[1:].unbind(), RowUpdate("adam", 0.1, 1e-8, (0.9, 0.99), step=3), None)
    return tables + 0.01 * gradients.sum()


def slots_errors(device: torch.device) -> Errors:
    """Share of keys that are not found in their slots while slots change keys, and number of wrong rows."""
    kernels = importlib.import_module("hstu.ops.triton.slots")
    capacity, wrong = 500, 0.0
    keys = torch.zeros(capacity, dtype=torch.int64, device=device)
    index, size = kernels.SlotIndex(keys), torch.full_like(keys[:1], capacity)
    slots = torch.arange(capacity, device=device)
    for step in range(3, 12):
        changed = slots[:: 1 + step % 3]
        former = keys[changed]
        keys[changed] = (changed * 16 + step) * 0x61C8864680B583EB
        index.insert(changed, size)
        differ = torch.cat([index.find(keys) != slots, index.find(former) != -1])
        wrong = max(wrong, float(differ.double().mean()))
    rows = torch.ones(capacity, 5, device=device)
    kernels.start_rows(rows, slots, size - 1)
    return {
        "slots of dynamic tables": (wrong, 0.0),
        "rows of dynamic tables": (float((rows.sum(1) != 5 * (slots == capacity - 1)).sum()), 0.0),
    }


def small_layout(
    device: torch.device,
    num_items: Sequence[int] = (1, 40, 130, 17),
    num_candidates: Sequence[int] = (0, 5, 0, 3),
    num_contextuals: int = 1,
    group_size: int = 2,
) -> JaggedLayout:
    """Sequences of unequal lengths with context and candidates, whose items are a second to months apart."""
    gaps = np.exp(np.random.default_rng(0).uniform(0, 16, sum(num_items))).astype(np.int64)
    return build_layout(
        item_lengths=np.array(num_items),
        num_sequences=len(num_items),
        num_contextuals=num_contextuals,
        num_candidates=np.array(num_candidates),
        tokens_per_item=1,
        target_group_size=group_size,
        device=device,
        item_times=torch.from_numpy(np.cumsum(gaps)).to(device),
    )


def is_usable(device: torch.device) -> bool:
    """Whether this process can still use the device after an exception: an illegal access breaks CUDA."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True
