"""Time every configuration of the Triton kernels that have several, on the GPU at hand.

    python scripts/bench/configurations.py [--bias] [--lengths 4096 4096] [--output docs/benchmarks/kernels/tiles.json]

Training measures nothing: it runs the first configuration of each table (TILES in hstu/ops/triton) that fits the GPU.
A row per kernel has the milliseconds of each, in the order of the table. Where another one than the first is the
fastest, put it first. Inputs that other kernels write are undefined here; the times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from harness import Row, command_line, publish
from torch import Tensor

from hstu.ops.functional import hstu_attention, project_uvqk
from hstu.ops.kernels import AttentionConfig, AttentionInputs, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS
from hstu.ops.self_check import small_layout
from hstu.ops.triton.launch import Launch, capability_of, recorded_launches
from hstu.ops.triton.operators import OPERATORS

Clock = Callable[[Callable[[], Any]], float]
"""Milliseconds of a function."""


def operators(
    lengths: Sequence[int], heads: int, head_dim: int, hidden: int, dtype: torch.dtype, has_bias: bool, device: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each operator with several configurations, at these shapes."""
    layout = small_layout(torch.device(device), lengths, [0] * len(lengths), num_contextuals=0)
    tokens = layout.num_tokens

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    def attention() -> None:
        tables = [drawn(size, dtype=torch.float32) for size in (2 * max(lengths) - 1, NUM_TIME_BUCKETS)]
        config = AttentionConfig(head_dim**-0.5, max(lengths), is_causal=True)
        shift, bias = drawn(heads, 3, head_dim, dtype=torch.float32), RelativeBias(*tables) if has_bias else None
        q, k, v = (drawn(tokens, heads, head_dim) for _ in range(3))
        out = hstu_attention(AttentionInputs(q, k, v, layout, config, bias), OPERATORS["attention"], shift)
        out.backward(torch.randn_like(out))

    def projection() -> None:
        width = 4 * heads * head_dim
        project_uvqk(drawn(tokens, hidden), drawn(width, hidden), drawn(width), OPERATORS["project_uvqk"])

    yield from {"attention": attention, "project_uvqk": projection}.items()


def times_of(launch: Launch, clock: Clock) -> dict[str, float | str]:
    """Configuration → milliseconds, or the error of one that does not run."""
    times: dict[str, float | str] = {}
    for config in launch.configs:
        run = partial(launch.kernel[launch.grid], **launch.arguments, **config.all_kwargs(), enable_fp_fusion=True)
        sizes = " ".join(f"{name}={size}" for name, size in config.kwargs.items())
        name = f"{sizes} warps={config.num_warps} stages={config.num_stages}"
        try:
            times[name] = round(clock(run), 4)
        except Exception as error:
            times[name] = f"{type(error).__name__}: {error}"[:200]
    return times


def main(argv: Sequence[str] | None = None, device: str = "cuda", clock: Clock = triton.testing.do_bench) -> None:
    """Measure, and print which configuration wins."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4099] * 32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--bias", action="store_true", help="attention with a relative bias")
    options = parser.parse_args(argv)
    dtype, capability = getattr(torch, options.dtype), capability_of(torch.device(device))
    report: Row = {"capability": capability, "shapes": {**vars(options), "output": None}, "kernels": []}
    shapes = options.lengths, options.heads, options.head_dim, options.hidden_size, dtype, options.bias
    for name, call in operators(*shapes, device):
        with recorded_launches(capability) as launches:
            call()
        for launch in launches:
            if len(launch.configs) > 1:
                times = times_of(launch, clock)
                taken = {config: ms for config, ms in times.items() if isinstance(ms, float)}
                fastest = min(taken, key=taken.__getitem__, default=None)
                row = {"operator": name, "kernel": launch.kernel.fn.__name__, "fastest": fastest, "ms": times}
                report["kernels"].append(row)
    publish(report, options.output)


if __name__ == "__main__":
    main()
