"""The compiled kernels are compared with PyTorch once a machine, before they are used: compilers have defects, too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.attention import AttentionRule, attend
from hstu.ops.backends import Backend
from hstu.ops.cpu import attention
from hstu.ops.cpu.build import KernelsUnavailable, library_file
from hstu.ops.cpu.normalise import l2_normalise
from hstu.ops.cpu.softmax_loss import SampledSoftmaxLoss
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.norm_mul_dropout import GateRule, norm_mul_dropout
from hstu.ops.normalise import l2_normalise as reference_normalise
from hstu.ops.pytorch import attention as reference_attention
from hstu.ops.pytorch import softmax_loss as reference_loss
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias
from hstu.ops.self_check import remember

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number: far above the rounding of float32, far below a defect."""

Operator = Callable[..., Tensor]
Case = tuple[str, Operator, Operator, list[Tensor]]
"""Name, kernel, reference, and the tensors that both are differentiated by."""


def check_kernels() -> None:
    """Compile, load and compare whatever has not been compared before on this machine. Less than a second.

    Raises KernelsUnavailable where there is no compiler, or where a kernel is wrong, with the numbers.
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
    remember(passed)
    log.info("C++ kernels agree with PyTorch to %.1g (checked in %.1f s)", worst, time.monotonic() - begun)


def _error(kernel: Operator, reference: Operator, leaves: Sequence[Tensor]) -> float:
    """Largest difference of the outputs and gradients, relative to the largest number of each."""
    results = []
    for function in (kernel, reference):
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    errors = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(*results, strict=True)]
    return float(np.max(errors))  # unlike max(), not blind to nan


def _cases() -> Iterator[Case]:
    layout = _layout()
    for width in (24, 80, 200):
        heads = [torch.randn(layout.num_tokens, 2, width, requires_grad=True) for _ in range(3)]
        tables = [torch.randn(size, requires_grad=True) for size in (99, NUM_TIME_BUCKETS)]
        for is_causal in (True, False):
            rule = AttentionRule(alpha=width**-0.5, scaling_seqlen=50, is_causal=is_causal)
            yield (
                "attention",
                lambda q, k, v, p, t, rule=rule: attend(q, k, v, layout, rule, RelativeBias(p, t), attention),
                lambda q, k, v, p, t, rule=rule: attend(q, k, v, layout, rule, RelativeBias(p, t), reference_attention),
                [*heads, *tables],
            )
    x, u = (torch.randn(70, 3, 17, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(51, requires_grad=True) for _ in range(2))
    yield (
        "norm_mul_dropout",
        lambda x, u, w, b: norm_mul_dropout(x, u, w, b, GateRule(1e-5, 0.0), Backend.CPU),
        lambda x, u, w, b: norm_mul_dropout(x, u, w, b, GateRule(1e-5, 0.0)),
        [x, u, weight, bias],
    )
    yield (
        "l2_normalise",
        lambda rows: l2_normalise(rows, 1e-6),
        lambda rows: reference_normalise(rows, 1e-6),
        [torch.randn(30, 50, requires_grad=True)],
    )
    vectors = [F.normalize(torch.randn(rows, 40), dim=1).requires_grad_() for rows in (30, 30, 20)]
    draws, targets, ids = torch.randint(20, (30, 37)), torch.randint(20, (30,)), torch.arange(20)
    yield (
        "sampled_softmax_loss",
        lambda *tensors: SampledSoftmaxLoss.apply(*tensors, draws, targets, ids, 0.1),
        lambda *tensors: reference_loss.SampledSoftmaxLoss.apply(*tensors, draws, targets, ids, 0.1),
        vectors,
    )


def _layout() -> JaggedLayout:
    """Sequences of 1 to 91 tokens, with a context and with candidates, months to a second apart."""
    items = np.array([1, 40, 90, 17])
    gaps = torch.exp(torch.rand(int(items.sum())) * 16).long()
    return build_layout(
        item_lengths=items,
        num_sequences=len(items),
        num_contextuals=1,
        num_candidates=np.array([0, 5, 0, 3]),
        tokens_per_item=1,
        target_group_size=2,
        device=torch.device("cpu"),
        item_times=gaps.cumsum(0),
    )
