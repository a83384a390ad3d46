"""Time HSTU attention and a whole layer on an NVIDIA GPU, beside what the GPU can do, measured in the same run.

    python scripts/bench/attention_gpu.py [--backend triton] [--length 512 1024 …] [--output FILE.json]

Attention: 32 sequences, 4 heads of 256, bfloat16, causal, of each length; forward and backward. Layer: hidden size
1024, the same heads. FLOPs: attention 2 · H · T² · d a sequence forward (the causal half of two products), 2.5 times
that backward; linear layers 2 · T · in · out, twice that backward. Ceilings: a bfloat16 product of 8192³ and a
device-to-device copy of 1 GiB. Times are medians; caches are flushed before each. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.model.layer import HSTULayer
from hstu.ops.attention import hstu_attention
from hstu.ops.backends import Backend
from hstu.ops.layout import JaggedLayout, build_layout

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CEILING_SIZE = 8192
COPY_BYTES = 1 << 30
FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Shape:
    """A batch of equally long sequences, and the layer that it goes through."""

    length: int
    batch_size: int = 32
    heads: int = 4
    head_dim: int = 256
    hidden: int = 1024

    @property
    def tokens(self) -> int:
        """T."""
        return self.length * self.batch_size

    @property
    def attention_flops(self) -> int:
        """Of forward: two products over the pairs that a causal mask leaves, counted as half of all."""
        return 2 * self.batch_size * self.heads * self.length**2 * self.head_dim

    @property
    def linear_flops(self) -> int:
        """Of forward: the projections before and after the attention."""
        inner = self.heads * self.head_dim
        return 2 * self.tokens * self.hidden * (4 * inner + inner)

    def layout(self, device: torch.device) -> JaggedLayout:
        """Items only, no times."""
        return build_layout(
            item_lengths=np.full(self.batch_size, self.length),
            num_sequences=self.batch_size,
            num_contextuals=0,
            num_candidates=None,
            tokens_per_item=1,
            target_group_size=1,
            device=device,
        )


def time_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of ``run`` on the device, after three runs that are not counted (they tune)."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times = []
    for repeat in range(repeats + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        if repeat >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def forward_backward(function: Callable[[], Tensor], leaves: list[Tensor], device: torch.device, repeats: int,
                     flops: float) -> dict[str, float]:  # fmt: skip
    """Milliseconds of forward and of backward alone, and TFLOPS of forward."""
    forward_ms = time_ms(function, device, repeats)
    out = function()
    grad = torch.randn_like(out)
    backward_ms = time_ms(
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True), device, repeats
    )
    return {"forward_ms": forward_ms, "forward_tflops": flops / forward_ms / 1e9, "backward_ms": backward_ms}


def measure_attention(shape: Shape, backend: Backend, device: torch.device, repeats: int) -> dict[str, float]:
    """One layer's attention on views of a projection, as the layer makes them."""
    projected = torch.randn(shape.tokens, shape.heads, 4, shape.head_dim, dtype=torch.bfloat16, device=device)
    _, v, q, k = (part.requires_grad_() for part in projected.unbind(2))
    layout = shape.layout(device)

    def run() -> Tensor:
        return hstu_attention(
            q, k, v, layout, alpha=shape.head_dim**-0.5, scaling_seqlen=shape.length, backend=backend
        )  # fmt: skip

    result = forward_backward(run, [q, k, v], device, repeats, shape.attention_flops)
    result["backward_tflops"] = 2.5 * shape.attention_flops / result["backward_ms"] / 1e9
    return result


def measure_layer(shape: Shape, backend: Backend, device: torch.device, repeats: int) -> dict[str, float]:
    """A whole layer, bfloat16 by autocast."""
    network = NetworkArgs(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        kv_channels=shape.head_dim,
        dtype_str="bfloat16",
    )
    layer: nn.Module = HSTULayer(network, shape.length, backend).to(device)
    layout = shape.layout(device)
    x = torch.randn(shape.tokens, shape.hidden, device=device, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            out: Tensor = layer(x, layout)
        return out

    flops = shape.attention_flops + shape.linear_flops
    result = forward_backward(run, [x, *layer.parameters()], device, repeats, flops)
    backward_flops = 2.5 * shape.attention_flops + 2 * shape.linear_flops
    both_ms = result["forward_ms"] + result["backward_ms"]
    return {**result, "tflops": (flops + backward_flops) / both_ms / 1e9}


def measure_ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    """TFLOPS of a large product, and GB/s read and written by a large copy."""
    a, b = torch.randn(2, CEILING_SIZE, CEILING_SIZE, dtype=torch.bfloat16, device=device)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_ms = time_ms(lambda: a @ b, device, repeats)
    copy_ms = time_ms(lambda: target.copy_(source), device, repeats)
    return {
        "matmul_tflops": 2 * CEILING_SIZE**3 / product_ms / 1e9,
        "copy_gb_per_s": 2 * COPY_BYTES / copy_ms / 1e6,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton", choices=[backend.value for backend in Backend])
    parser.add_argument("--length", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--skip-layer", action="store_true", help="attention only")
    parser.add_argument("--output", type=Path, default=None, help="also write the JSON here")
    return parser.parse_args(argv)


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """One shape a length."""
    return [Shape(length, args.batch_size, args.heads, args.head_dim, args.hidden) for length in args.length]


def main() -> None:
    """Measure and print."""
    args = parse()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU; on a CPU run scripts/bench/attention_cpu.py")
    device, backend = torch.device("cuda", torch.cuda.current_device()), Backend(args.backend)
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "backend": backend.value,
        "ceilings_before": measure_ceilings(device, args.repeats),
    }
    for shape in shapes_of(args):
        measured: dict[str, object] = {"attention": measure_attention(shape, backend, device, args.repeats)}
        if not args.skip_layer:
            measured["layer"] = measure_layer(shape, backend, device, args.repeats)
        report[str(shape.length)] = measured
        torch.cuda.empty_cache()
    report["ceilings_after"] = measure_ceilings(device, args.repeats)
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
