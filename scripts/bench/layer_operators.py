"""Time the operators of a layer besides attention: W_uvqk with SiLU beside cuBLAS and SiLU, norm and gate in GB/s.

    python scripts/bench/layer_operators.py [--device cuda] [--output operators.json]

bfloat16 with a float32 residual stream, as in training. GB/s count the bytes that must be read and written at least,
so that "copy_gb_s" of the ceilings is the limit. GFLOPS count matrix products.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from attention import BACKENDS
from harness import Pass, Row, begin, finish, operator_command_line, rates, time_passes
from torch import Tensor

from hstu.ops.functional import add_layer_norm, norm_mul_dropout, project_uvqk
from hstu.ops.kernels import GateConfig, KernelShapes
from hstu.ops.select import resolve_kernels

SIZES = {"cpu": (512, 64, 2, 32), "cuda": (32 * 4096, 1024, 4, 256)}
"""Default tokens, hidden size, heads and head dim for each device."""
DTYPE = torch.bfloat16


def rows_of(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """One record per operator and variant."""
    tokens, hidden, inner = options.tokens, options.hidden, options.heads * options.head_dim
    shapes = KernelShapes(options.head_dim, options.heads, hidden, hidden, DTYPE)
    kernels = resolve_kernels(BACKENDS[device.type][-1] if device.type == "cuda" else BACKENDS["cpu"][0], shapes)

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    normalized, weight, bias = of(tokens, hidden, dtype=DTYPE), of(4 * inner, hidden, dtype=DTYPE), of(4 * inner)
    shift = bias.detach().to(DTYPE).requires_grad_()
    projections = {
        "ours": Pass(
            lambda: project_uvqk(normalized, weight, shift, kernels.project_uvqk), [normalized, weight, shift]
        ),
        "PyTorch": Pass(lambda: F.silu(F.linear(normalized, weight, shift)), [normalized, weight, shift]),
    }
    flops = 2.0 * tokens * hidden * 4 * inner
    yield from _timed("W_uvqk and SiLU", projections, (flops, 2 * flops), "gflops", device, options.rounds)

    x, update, scale, offset = of(tokens, hidden), of(tokens, hidden, dtype=DTYPE), of(hidden), of(hidden)

    def ours() -> tuple[Tensor, ...]:
        return add_layer_norm(x, update, scale, offset, 1e-6, DTYPE, kernels.add_layer_norm)

    def plain() -> tuple[Tensor, ...]:
        total = x + update
        return total, F.layer_norm(total, (hidden,), scale, offset, 1e-6).to(DTYPE)

    leaves, size = [x, update, scale, offset], tokens * hidden
    norms = {"ours": Pass(ours, leaves), "PyTorch": Pass(plain, leaves)}
    yield from _timed("residual and norm", norms, (12.0 * size, 16.0 * size), "gb_s", device, options.rounds)

    attended, u = (of(tokens, options.heads, options.head_dim, dtype=DTYPE) for _ in range(2))
    gamma, beta = of(inner), of(inner)
    gate = GateConfig(1e-6, 0.2)
    gates = {
        "ours": Pass(
            lambda: norm_mul_dropout(attended, u, gamma, beta, gate, kernels.norm_mul_dropout),
            [attended, u, gamma, beta],
        )
    }
    size = tokens * inner
    yield from _timed("norm, gate, dropout", gates, (6.0 * size, 10.0 * size), "gb_s", device, options.rounds)


def _timed(
    operator: str, passes: dict[str, Pass], amounts: tuple[float, float], unit: str, device: torch.device, rounds: int
) -> Iterator[Row]:
    """``amounts``: operations or bytes of forward and of backward."""
    for name, times in time_passes(passes, device, rounds).items():
        yield rates({"operator": operator, "variant": name, **times}, *amounts, unit)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, completed by the default shape of the device."""
    add = (commands := operator_command_line(__doc__)).add_argument
    for name in ("tokens", "hidden", "heads", "head-dim"):
        add(f"--{name}", type=int)
    options = commands.parse_args(argv)
    for name, size in zip(("tokens", "hidden", "heads", "head_dim"), SIZES[options.device], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    sizes = {name: getattr(options, name) for name in ("tokens", "hidden", "heads", "head_dim")}
    finish(report | sizes | {"operators": list(rows_of(options, device))}, options)


if __name__ == "__main__":
    main()
