"""Compares the C++ kernels with PyTorch once per machine before first use: compilers have defects, too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.cpu.build import KernelsUnavailable, library_file
from hstu.ops.cpu.operators import OPERATORS
from hstu.ops.functional import hstu_attention, norm_mul_dropout
from hstu.ops.kernels import (
    AttentionConfig,
    AttentionInputs,
    GateConfig,
    GateInputs,
    Negatives,
    RelativeBias,
    SeenItems,
)
from hstu.ops.layout import NUM_TIME_BUCKETS
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import RowUpdate, UpdateRows
from hstu.ops.self_check import largest_error, record_passed, small_layout

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference relative to the largest number: far above the rounding of float32, far below a defect."""

Operator = Callable[..., Tensor]
Case = tuple[str, Operator, Operator, list[Tensor]]
"""Name, kernel, reference, and the tensors that both are differentiated by."""


def check_kernels() -> None:
    """Compile, load and compare the kernels unless this machine has compared them before. Less than a second.

    Raises KernelsUnavailable where there is no compiler, or where a kernel is wrong.
    """
    library = library_file()
    passed = library.with_suffix(".checked")
    if passed.exists():
        return
    begun = time.monotonic()
    worst = 0.0
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for name, kernel, reference, leaves in _cases():
            error = _error(kernel, reference, leaves)
            if not error <= TOLERANCE:
                raise KernelsUnavailable(
                    f"the C++ kernel of {name} differs from PyTorch by {error:.2g} of the largest number, more than "
                    f"{TOLERANCE}; please report that, with the output of `c++ --version`"
                )
            worst = max(worst, error)
    record_passed(passed)
    log.info("C++ kernels agree with PyTorch to %.1g (checked in %.1f s)", worst, time.monotonic() - begun)


def _error(kernel: Operator, reference: Operator, leaves: Sequence[Tensor]) -> float:
    """Largest difference of the outputs and gradients, relative to the largest number of each."""
    results = []
    for function in (kernel, reference):
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    return largest_error(*results)


def _cases() -> Iterator[Case]:
    layout = small_layout(torch.device("cpu"))
    for width in (24, 80, 200):
        heads = [torch.randn(layout.num_tokens, 2, width, requires_grad=True) for _ in range(3)]
        tables = [torch.randn(size, requires_grad=True) for size in (99, NUM_TIME_BUCKETS)]
        for mask in ({}, {"is_causal": False}, {"max_span": 20, "full_tokens": 9}):
            config = AttentionConfig(alpha=width**-0.5, scaling_seqlen=50, **mask)
            yield _case(
                "attention",
                lambda kernels, q, k, v, p, t, config=config: hstu_attention(
                    AttentionInputs(q, k, v, layout, config, RelativeBias(p, t)), kernels
                ),
                [*heads, *tables],
            )
    x, u = (torch.randn(70, 3, 17, requires_grad=True) for _ in range(2))
    affine = [torch.randn(51, requires_grad=True) for _ in range(2)]
    yield _case(
        "norm_mul_dropout",
        lambda kernels, x, u, w, b: norm_mul_dropout(GateInputs(x, u, w, b, GateConfig(1e-5, 0.0)), kernels),
        [x, u, *affine],
    )
    yield _case("l2_normalize", lambda kernel, rows: kernel(rows, 1e-6), [torch.randn(30, 50, requires_grad=True)])
    vectors = [F.normalize(torch.randn(rows, 40), dim=1).requires_grad_() for rows in (30, 30, 20)]
    draws, targets, ids = torch.randint(20, (30, 37)), torch.randint(20, (30,)), torch.arange(20)
    places = torch.arange(30, dtype=torch.int32)
    seen = SeenItems(torch.randint(-1, 60, (2, 20), dtype=torch.int32), places % 2, places)
    for log_weights, hidden in ((None, None), (torch.randn(20), None), (torch.randn(20), seen)):
        for name, drawn in (("sampled_softmax_loss", draws), ("pool_softmax_loss", None)):
            negatives = Negatives(targets, ids, 0.1, log_weights, hidden, drawn)
            yield _case(name, lambda kernel, *tensors, negatives=negatives: kernel(*tensors, negatives), vectors)
    yield _case("update_rows", _train_rows, [torch.randn(40, 21, requires_grad=True)])


def _train_rows(kernel: UpdateRows, gradients: Tensor) -> Tensor:
    """A table and its states after a step of Adam on some rows, plus a term that has the derivative of a case."""
    rows = (torch.arange(len(gradients)) * 7 % 30)[None]
    gradient = torch.sparse_coo_tensor(rows, gradients.detach(), (50, gradients.shape[1]), check_invariants=True)
    tables = torch.ones(3, 50, gradients.shape[1])
    update = RowUpdate("adam", 0.1, 1e-8, (0.9, 0.99), step=3)
    kernel(gradient, tables[0], tables[1:].unbind(), update)
    return tables + 0.01 * gradients.sum()


def _case(name: str, function: Callable[..., Tensor], leaves: list[Tensor]) -> Case:
    """``function`` of the C++ kernels and of the reference."""
    return name, partial(function, OPERATORS[name]), partial(function, getattr(REFERENCE_KERNELS, name)), leaves
