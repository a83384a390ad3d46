"""Time the softmax losses and a layer's operators besides attention beside PyTorch, and compare them with float64.

    python scripts/bench/operators.py [--device cuda] [--output operators.json]

bfloat16 with a float32 residual stream, as in training. GB/s count the bytes that must be read and written at least,
so that "copy_gb_s" of the ceilings is the limit. GFLOPS count matrix products. "errors" are the norms of the errors of
the outputs and gradients relative to the norms of those in float64. Full softmax is timed beside its products alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import harness
import torch
import torch.nn.functional as F
from attention import BACKENDS
from padded_baseline import gathered_loss
from torch import Tensor

from hstu.ops import costs
from hstu.ops.functional import add_layer_norm, norm_mul_dropout, project_uvqk, softmax_loss
from hstu.ops.kernels import AddLayerNormInputs, GateConfig, GateInputs, Kernels, KernelShapes, Negatives, SeenItems
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.pytorch.softmax_loss import block_shape
from hstu.ops.select import resolve_kernels

SIZES: dict[str, dict[str, int]] = {
    "cpu": dict(tokens=512, hidden=64, heads=2, head_dim=32, positions=512, pool=200, draws=16, item_dim=50),
    "cuda": dict(tokens=131072, hidden=1024, heads=4, head_dim=256, positions=13600, pool=3700, draws=128, item_dim=50),
}
"""Default sizes for each device. The sampled softmax has ``draws`` of ``pool`` items at each of ``positions``."""
DTYPE = torch.bfloat16
TEMPERATURE, EPS = 0.05, 1e-6
PRODUCT_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass(frozen=True)
class Operator:
    """An operator and the sizes of its inputs."""

    name: str
    run: Callable[..., tuple[Tensor, ...]]
    """Takes kernels and the leaves."""
    plain: Callable[..., tuple[Tensor, ...]] | None
    """The same of PyTorch's own operators; takes the leaves."""
    leaves: Callable[[], list[Tensor]]
    amounts: tuple[float, float]
    """Operations or bytes of forward and of backward."""
    unit: str


def operators(options: argparse.Namespace, device: torch.device) -> Iterator[Operator]:
    """The operators at the sizes of the command line."""
    tokens, hidden, inner = options.tokens, options.hidden, options.heads * options.head_dim

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    flops = 2.0 * tokens * hidden * 4 * inner
    yield Operator(
        "W_uvqk and SiLU",
        lambda kernels, x, weight, bias: (project_uvqk(x, weight, bias, kernels.project_uvqk),),
        lambda x, weight, bias: (F.silu(F.linear(x, weight, bias)),),
        lambda: [of(tokens, hidden, dtype=DTYPE), of(4 * inner, hidden, dtype=DTYPE), of(4 * inner, dtype=DTYPE)],
        (flops, 2 * flops),
        "gflops",
    )

    def norm(kernels: Kernels, x: Tensor, update: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return add_layer_norm(AddLayerNormInputs(x, update, scale, offset, 1e-6, update.dtype), kernels.add_layer_norm)

    def plain_norm(x: Tensor, update: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return (total := x + update), F.layer_norm(total, (hidden,), scale, offset, 1e-6).to(update.dtype)

    size = tokens * hidden
    yield Operator(
        "residual and norm",
        norm,
        plain_norm,
        lambda: [of(tokens, hidden), of(tokens, hidden, dtype=DTYPE), of(hidden), of(hidden)],
        (12.0 * size, 16.0 * size),
        "gb_s",
    )
    size = tokens * inner
    for dropout in (0.0, 0.2):  # without dropout it can be compared
        gate = GateConfig(1e-6, dropout)
        yield Operator(
            f"norm, gate, dropout {dropout}",
            lambda kernels, x, u, gamma, beta, gate=gate: (
                norm_mul_dropout(GateInputs(x, u, gamma, beta, gate), kernels.norm_mul_dropout),
            ),
            None,
            lambda: [
                *(of(tokens, options.heads, options.head_dim, dtype=DTYPE) for _ in range(2)),
                of(inner),
                of(inner),
            ],
            (6.0 * size, 10.0 * size),
            "gb_s",
        )


def sampled_softmax(options: argparse.Namespace, device: torch.device) -> Operator:
    """From vectors that are not yet normalised to the loss; our forward already computes the gradients."""
    ids = torch.arange(options.pool, device=device)
    targets = torch.randint(options.pool, (options.positions,), device=device)
    draws = torch.randint(options.pool, (options.positions, options.draws), device=device)
    short_draws = draws.int()

    def ours(kernels: Kernels, *vectors: Tensor) -> tuple[Tensor]:
        queries, positives, items = (kernels.l2_normalize(x, EPS) for x in vectors)
        kernel = kernels.sampled_softmax_loss
        loss = softmax_loss(queries, positives, items, Negatives(targets, ids, TEMPERATURE, draws=short_draws), kernel)
        return (loss / options.positions,)

    def gathered(queries: Tensor, positives: Tensor, items: Tensor) -> tuple[Tensor]:
        hit = draws == targets[:, None]
        return (gathered_loss(queries, positives, F.embedding(draws, items), hit, TEMPERATURE, EPS),)

    def vectors() -> list[Tensor]:
        rows = options.positions, options.positions, options.pool
        return [torch.randn(each, options.item_dim, device=device).requires_grad_() for each in rows]

    operations = costs.sampled_softmax(options.positions, options.draws, options.item_dim).flops
    return Operator("sampled softmax", ours, gathered, vectors, (operations / 3, operations * 2 / 3), "gflops")


def full_softmax(options: argparse.Namespace, device: torch.device, masks: bool) -> Operator:
    """Of all positions over the pool, and its three matrix products alone, PRODUCT_ELEMENTS scores at a time."""
    rows, pool, width = options.positions, options.pool, options.item_dim
    ids, of_rows = torch.arange(pool, device=device), torch.arange(rows, dtype=torch.int32, device=device)
    first = torch.randint(99, (1 + rows // 32, pool), dtype=torch.int32, device=device)
    seen = SeenItems(first, of_rows // 32, of_rows % 32) if masks else None
    negatives = Negatives(torch.randint(pool, (rows,), device=device), ids, TEMPERATURE, seen=seen)
    columns = block_shape(rows, pool, PRODUCT_ELEMENTS[device.type], rows)[1]
    scores, grad, grad_pool = (
        torch.zeros(*shape, device=device) for shape in ((rows * columns,), (rows, width), (pool, width))
    )

    def products(queries: Tensor, _: Tensor, items: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            for of_items, grad_items in zip(items.split(columns), grad_pool.split(columns), strict=True):
                block = torch.mm(queries, of_items.t(), out=scores[: rows * len(of_items)].view(rows, -1))
                grad.addmm_(block, of_items)
                torch.mm(block.t(), queries, out=grad_items)
        return (queries[0, 0],)  # forward of ours has computed the gradients, too

    return Operator(
        "full softmax, seen items masked" if masks else "full softmax",
        lambda kernels, q, p, items: (softmax_loss(q, p, items, negatives, kernels.pool_softmax_loss),),
        products,
        lambda: [F.normalize(torch.randn(n, width, device=device)).requires_grad_() for n in (rows, rows, pool)],
        (costs.pool_softmax(rows, pool, width).flops, 0.0),
        "gflops",
    )


def measure(operator: Operator, kernels: Kernels, device: torch.device, rounds: int) -> list[harness.Row]:
    """A row for ours and one for PyTorch."""
    leaves = operator.leaves()
    variants = {"ours": partial(operator.run, kernels), "PyTorch": operator.plain}
    passes = {name: harness.Pass(partial(run, *leaves), leaves) for name, run in variants.items() if run}
    passes, rows = harness.runnable(passes)
    for name, times in harness.time_passes(passes, device, rounds).items():
        rows.append(harness.rates({"variant": name, **times}, *operator.amounts, operator.unit))
        if name == "ours" and "0.2" not in operator.name and operator.amounts[0] < 1e11:
            rows[-1]["errors"] = errors_of(operator, passes[name], leaves)
    return rows


def errors_of(operator: Operator, ours: harness.Pass, leaves: list[Tensor]) -> list[float]:
    """Of the outputs, and of the gradients of a random slope."""
    out = ours.forward()
    slopes = [torch.randn_like(x) for x in out]
    computed = [*out, *torch.autograd.grad(out, leaves, slopes)]
    doubled = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = operator.run(REFERENCE_KERNELS, *doubled)
    of_exact = torch.autograd.grad(exact, doubled, [x.double() for x in slopes])
    return [harness.relative_error(x, of) for x, of in zip(computed, [*exact, *of_exact], strict=True)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, completed by the default shape of the device."""
    add = (commands := harness.operator_command_line(__doc__)).add_argument
    for name in SIZES["cpu"]:
        add(f"--{name.replace('_', '-')}", type=int)
    options = commands.parse_args(argv)
    for name, size in SIZES[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = harness.begin(options)
    report |= {name: getattr(options, name) for name in SIZES["cpu"]}
    shapes = KernelShapes(options.head_dim, options.heads, options.hidden, options.item_dim, DTYPE)
    kernels = resolve_kernels(BACKENDS[device.type][-1] if device.type == "cuda" else BACKENDS["cpu"][0], shapes)
    losses = sampled_softmax(options, device), *(full_softmax(options, device, masks) for masks in (False, True))
    for operator in (*operators(options, device), *losses):
        timed = partial(measure, operator, kernels, device, options.rounds)
        harness.attempt(report, "operators", {"operator": operator.name}, timed, options.output)
    harness.finish(report, options)


if __name__ == "__main__":
    main()
