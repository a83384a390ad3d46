"""Time HSTU attention beside padded attention in plain PyTorch, the same compiled, and PyTorch's softmax attention.

    python scripts/bench/attention.py [--device cuda] [--dtype bfloat16] [--output docs/benchmarks/attention/cpu.json]

"lengths" has batches of equally long sequences with a causal mask. "distributions" has batches with the same sum of n²:
lengths all equal, uniform, and one long sequence among short ones, which shows the cost of padding. Operations are
counted as NVIDIA recsys-examples counts them, for softmax as well: 2 · H · n² · d per sequence forward (half of two
products) and 2.5 times that backward, without those that padding adds. "kernels_ms" lists the kernels of a forward and
backward one by one, by the profiler. All variants run in turn in one process. The limits of the device are measured
before and after. --span and --full-tokens hide pairs as NetworkArgs.max_attention_span does: then only ours are timed,
and hidden pairs are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import (
    Pass,
    Row,
    attempt,
    begin,
    compiled,
    finish,
    kernel_times,
    longest_kernels,
    name_of,
    operator_command_line,
    rates,
    relative_error,
    runnable,
    time_passes,
)
from padded_baseline import padded_attention
from torch import Tensor

from hstu.ops.costs import NO_WINDOW, Window, attention_flops
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Backend, Kernels, KernelShapes, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout, build_layout
from hstu.ops.select import resolve_kernels

SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"length": [128, 256, 512, 1024, 2048], "tokens": 8192, "heads": 2, "head_dim": 64},
    "cuda": {"length": [512, 1024, 2048, 4096, 8192, 16384], "tokens": None, "heads": 4, "head_dim": 256},
}
"""Default options for each device. On a GPU, they are the shape of NVIDIA's published numbers."""
SEQUENCES = 32
"""Sequences of a batch where --tokens is not given."""
MOST_SCORES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Padded attention is left out where its scores [B, H, N, N] would have more elements."""
KERNELS = 6
"""Kernels of a forward and backward that a row lists by name."""
BACKENDS = {"cpu": (Backend.CPU, Backend.PYTORCH), "cuda": (Backend.CUTLASS, Backend.TRITON)}
LABELS = {Backend.CPU: "ours, C++", Backend.PYTORCH: "ours, PyTorch"}


def kernels_of(backend: Backend, width: int, dtype: torch.dtype = torch.float32, has_bias: bool = False) -> Kernels:
    """The kernels of a backend for one head, rows and vectors of ``width`` channels."""
    return resolve_kernels(backend, KernelShapes(width, 1, width, width, dtype, has_bias))


@dataclass(frozen=True)
class Shape:
    """Lengths of the sequences of a batch, and the heads."""

    lengths: np.ndarray
    heads: int
    head_dim: int
    window: Window = NO_WINDOW

    @property
    def pairs(self) -> int:
        """Sum of n²."""
        return int((self.lengths**2).sum())

    @property
    def padded_pairs(self) -> int:
        """B · N²."""
        return len(self.lengths) * int(self.lengths.max()) ** 2

    @property
    def flops(self) -> int:
        """Floating-point operations of forward."""
        none = np.zeros_like(self.lengths)
        return int(attention_flops(self.lengths, none, self.heads, self.head_dim, window=self.window).sum())

    def config(self, alpha: float) -> AttentionConfig:
        """The attention of these sequences."""
        longest, window = int(self.lengths.max()), self.window
        return AttentionConfig(alpha, longest, max_span=window.max_span, full_tokens=window.full_tokens)

    def layout(self, device: torch.device, item_times: Tensor | None = None) -> JaggedLayout:
        """The layout of a batch of items without context and candidates."""
        return build_layout(
            item_lengths=self.lengths,
            num_sequences=len(self.lengths),
            num_contextuals=0,
            num_candidates=None,
            tokens_per_item=1,
            target_group_size=1,
            device=device,
            item_times=item_times,
        )


def movielens_lengths(batch_size: int, rng: np.random.Generator, longest: int = 200, mean: int = 107) -> np.ndarray:
    """Random lengths with the mean and the maximum of ML-1M histories; many are at the maximum."""
    lengths = np.clip(rng.lognormal(mean=4.6, sigma=0.95, size=batch_size), 10, longest).astype(np.int64)
    surplus = int(lengths.sum()) - mean * batch_size
    while surplus:
        place = rng.integers(batch_size)
        step = int(np.sign(surplus))
        if 10 <= lengths[place] - step <= longest:
            lengths[place] -= step
            surplus -= step
    return lengths


def movielens_times(lengths: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Times of items in seconds, int64 [Σ lengths], a second to months apart."""
    return torch.from_numpy(np.cumsum(np.exp(rng.uniform(0, 16, int(lengths.sum()))).astype(np.int64)))


def distributions(longest: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Lengths of three batches with almost equal sums of n². The first has 16 sequences of half of ``longest``."""
    equal = np.full(16, longest // 2)
    target = int((equal**2).sum())

    def until_full(draw: Callable[[], int]) -> np.ndarray:
        lengths: list[int] = []
        while (left := target - sum(n * n for n in lengths)) > 0:
            lengths.append(min(draw(), max(1, round(left**0.5))))
        return np.array(lengths)

    first = iter([longest])
    return {
        "all equal": equal,
        "uniform": until_full(lambda: int(rng.integers(1, longest + 1))),
        "few long, many short": until_full(lambda: next(first, 0) or int(rng.integers(1, longest // 4))),
    }


def passes_of(
    shape: Shape, dtype: torch.dtype, device: torch.device, with_compiled: Callable[..., Tensor] | None
) -> dict[str, Pass]:
    """All variants for ``shape``. The padded variants get padded inputs: padding itself is not timed."""
    alpha, longest = shape.head_dim**-0.5, int(shape.lengths.max())
    tokens, layout = int(shape.lengths.sum()), shape.layout(device)
    projected = torch.randn(tokens, shape.heads, 4, shape.head_dim, dtype=dtype, device=device)
    _, v, q, k = (part.requires_grad_() for part in projected.unbind(2))  # views of a projection, as the layer makes

    def ours(backend: Backend) -> Pass:
        config, kernels = shape.config(alpha), kernels_of(backend, shape.head_dim, dtype).attention
        return Pass(lambda: hstu_attention(AttentionInputs(q, k, v, layout, config), kernels), [q, k, v])

    passes = {LABELS.get(backend, f"ours, {backend.value}"): ours(backend) for backend in BACKENDS[device.type]}
    if shape.window.max_span is not None:
        return passes
    size = (len(shape.lengths), longest, shape.heads, shape.head_dim)
    padded = [torch.randn(size, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    if shape.padded_pairs * shape.heads <= MOST_SCORES[device.type]:
        mask = torch.ones(longest, longest, dtype=dtype, device=device).tril()
        plain: dict[str, Callable[..., Tensor] | None] = {
            "padded": padded_attention,
            "padded, compiled": with_compiled,
        }
        for name, function in plain.items():
            if function is not None:
                passes[name] = Pass(lambda f=function: f(*padded, mask, alpha, longest), padded)  # type: ignore[misc]
    first, second, third = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in padded)
    passes["softmax (SDPA), padded"] = Pass(
        lambda: F.scaled_dot_product_attention(first, second, third, is_causal=True), [first, second, third]
    )
    return passes


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int, with_compiled: Callable[..., Tensor] | None
) -> list[Row]:
    """One row per variant. The rows of ours also have their errors."""
    passes, rows = runnable(passes_of(shape, dtype, device, with_compiled))
    for name, times in time_passes(passes, device, rounds).items():
        row = rates({"variant": name, "dtype": name_of(dtype), **times}, shape.flops, 2.5 * shape.flops, "gflops")
        if name.startswith("ours"):
            row["kernels_ms"] = longest_kernels(kernel_times(passes[name], device), KERNELS)
            row["errors"] = errors_of(passes[name], shape, device)
        rows.append(row)
    return rows


def errors_of(ours: Pass, shape: Shape, device: torch.device) -> Row:
    """Norms of the errors of O, dQ, dK and dV relative to float64, of the last head of the last sequence.

    The kernels run on the whole batch, so that its last tokens have the largest offsets.
    """
    length = int(shape.lengths[-1])
    out = ours.forward()
    grad = torch.randn_like(out)
    results = [out, *torch.autograd.grad(out, ours.leaves, grad)]
    q, k, v = exact = [x[-length:, -1:].detach().double().requires_grad_() for x in ours.leaves]
    layout = Shape(shape.lengths[-1:], 1, shape.head_dim).layout(device)
    config = shape.config(shape.head_dim**-0.5)
    kernels = kernels_of(Backend.PYTORCH, shape.head_dim).attention
    reference = hstu_attention(AttentionInputs(q, k, v, layout, config), kernels)
    references = [reference, *torch.autograd.grad(reference, exact, grad[-length:, -1:].double())]
    pairs = zip(("O", "dQ", "dK", "dV"), results, references, strict=True)
    return {name: relative_error(x[-length:, -1:], of) for name, x, of in pairs}


def movielens(device: torch.device, rounds: int) -> list[Row]:
    """Our kernels on 128 sequences of ML-1M lengths with one head of 50, with and without a relative bias."""
    rng = np.random.default_rng(0)
    shape = Shape(movielens_lengths(128, rng), 1, 50)
    layout = shape.layout(device, movielens_times(shape.lengths, rng))
    q, k, v = (torch.randn(layout.num_tokens, 1, 50, requires_grad=True) for _ in range(3))
    weights = [torch.randn(n, requires_grad=True) for n in (2 * 200 - 1, NUM_TIME_BUCKETS)]

    def attend(backend: Backend, bias: RelativeBias | None) -> Tensor:
        kernels = kernels_of(backend, 50, has_bias=bias is not None).attention
        return hstu_attention(AttentionInputs(q, k, v, layout, AttentionConfig(0.14, 200), bias), kernels)

    passes = {}
    for backend in BACKENDS[device.type]:
        name = LABELS[backend]
        passes[f"{name}, relative bias"] = Pass(
            lambda b=backend: attend(b, RelativeBias(*weights)), [q, k, v, *weights]  # type: ignore[misc]
        )  # fmt: skip
        passes[name] = Pass(lambda b=backend: attend(b, None), [q, k, v])  # type: ignore[misc]
    measured = time_passes(passes, device, rounds)
    return [
        rates({"variant": name, **times}, shape.flops, 2.5 * shape.flops, "gflops") for name, times in measured.items()
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, completed by the default shape of the device."""
    add = (commands := operator_command_line(__doc__)).add_argument
    add("--dtype", choices=("float32", "bfloat16"))
    add("--length", type=int, nargs="+")
    add("--tokens", type=int, help="of a batch (default on a GPU: 32 sequences)")
    add("--heads", type=int)
    add("--head-dim", type=int)
    add("--span", type=int, help="NetworkArgs.max_attention_span")
    add("--full-tokens", type=int, default=0, help="newest tokens that see the whole history")
    options = commands.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    for name, value in SHAPES[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """Batches of equally long sequences."""
    window = Window(options.span, options.full_tokens, 0)
    counts = [max(1, options.tokens // n) if options.tokens else SEQUENCES for n in options.length]
    lengths = [np.full(count, n) for count, n in zip(counts, options.length, strict=True)]
    return [Shape(each, options.heads, options.head_dim, window) for each in lengths]


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    dtype = getattr(torch, options.dtype)
    with_compiled = compiled(padded_attention) if options.compile else None
    report |= {"heads": options.heads, "head_dim": options.head_dim}
    add = partial(attempt, report, output=options.output)

    def timed(shape: Shape, function: Callable[..., Tensor] | None = None) -> list[Row]:
        return measure(shape, dtype, device, options.rounds, function)

    for shape in shapes_of(options):
        batch = {"length": int(shape.lengths[0]), "sequences": len(shape.lengths)}
        add("lengths", batch, partial(timed, shape, with_compiled))
    longest = sorted(options.length)[len(options.length) // 2] * 2
    for name, lengths in distributions(longest, np.random.default_rng(0)).items():
        shape = Shape(lengths, options.heads, options.head_dim, Window(options.span, options.full_tokens, 0))
        drawn: Row = {"lengths": name, "sequences": len(lengths), "sum_n2": shape.pairs, "b_n2": shape.padded_pairs}
        add("distributions", drawn, partial(timed, shape))
    if device.type == "cpu":
        add("ml_1m", {}, lambda: movielens(device, options.rounds))
    finish(report, options)


if __name__ == "__main__":
    main()
