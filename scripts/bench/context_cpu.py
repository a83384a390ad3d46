"""Measure how context parallelism spreads one very long history among short ones over the ranks of a group.

    python scripts/bench/context_cpu.py [--longest 100000] [--short 200] [--output docs/benchmarks/context/context.json]

For each number of ranks, which are processes with one thread each, HSTU layers run forward and backward on the same
batch of one long and many short sequences. Of each rank: its seconds of the processor, the bytes that autograd keeps,
the most bytes of tensors at one time, its own input apart, and the bytes that it receives for attention. Loss and
gradients must be those of one rank. "work_of_data_parallelism" is what the rank with the long history would have:
all its pairs of tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from attention import Shape
from harness import Row, command_line, publish
from torch import Tensor

from hstu.config.args import NetworkArgs
from hstu.model.stack import HSTULayer
from hstu.observe.logging import quiet_libraries
from hstu.ops.kernels import KernelShapes
from hstu.ops.select import select_kernels
from hstu.parallel import mesh as meshes
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh

HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM


class CountingComm(ProcessGroupComm):
    """Counts the bytes that this rank receives from others for attention."""

    received = 0

    def _exchange(self, by_rank: Tensor):  # type: ignore[no-untyped-def]
        self.received += by_rank.nbytes * (self.cp_size - 1) // self.cp_size
        return super()._exchange(by_rank)


def lengths_of(options: argparse.Namespace) -> np.ndarray:
    """Tokens of each sequence: one long, the others of 1 to 200."""
    short = np.random.default_rng(0).integers(1, 201, options.short)
    return np.concatenate([[options.longest], short])


def run_layers(mesh: Mesh, options: argparse.Namespace) -> Row:
    """Forward and backward of the layers on one rank."""
    network = NetworkArgs(
        num_layers=options.layers, hidden_size=HIDDEN, num_attention_heads=HEADS, kv_channels=HEAD_DIM,
        dtype_str="float32", hidden_dropout=0.0, max_attention_span=options.span,
    )  # fmt: skip
    shape = Shape(lengths_of(options), HEADS, HEAD_DIM)
    layout = shape.layout(mesh.device)
    shapes = KernelShapes(HEAD_DIM, HEADS, HIDDEN, HIDDEN, torch.float32, has_bias=False, has_window=bool(options.span))
    kernels = select_kernels(network.kernel_backend, False, mesh.device, shapes)
    torch.manual_seed(0)
    layers = [HSTULayer(network, int(shape.lengths.max()), kernels, index) for index in range(options.layers)]
    comm = CountingComm(mesh, sequence_parallel=False)
    for layer in layers:
        layer.comm = comm
    x = torch.randn(layout.num_tokens, HIDDEN).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    begun = time.process_time()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        own, padded = comm.split_tokens(x, layout)
        update = None
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for layer in layers:
                own, update = layer(own, padded, update)
        assert update is not None
        loss = (own + update).square().sum()
        loss.backward()
    cpu_s = time.process_time() - begun
    return {
        "cpu_s": round(cpu_s, 2),
        "kept_bytes": sum(kept.values()),
        "peak_bytes": peak_bytes(recorded),
        "received_bytes": comm.received,
        "loss": float(loss.detach()),
        "weight_gradient": layers[0].uvqk.weight.grad,
    }


def peak_bytes(recorded: torch.profiler.profile) -> int:
    """The most bytes that tensors had at one time, beyond those that they had at the start."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    totals = [(each["ts"], each["args"]) for each in events if each.get("name") == "[memory]"]
    changes = [args["Bytes"] for _, args in sorted(totals, key=lambda total: total[0])]
    return int(np.cumsum(changes).max())


def serve(pipe: Connection, rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    """In the process of a rank: send what ``run_layers`` measures."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    quiet_libraries()
    mesh = meshes.start(context_parallel_size=ranks)
    torch.set_num_threads(1)
    pipe.send(run_layers(mesh, options))
    meshes.finish()


def measure(ranks: int, options: argparse.Namespace) -> list[Row]:
    """What each of so many ranks measures."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = []
    for rank in range(ranks):
        pipe, remote = context.Pipe()
        context.Process(target=serve, args=(remote, rank, ranks, port, options), daemon=True).start()
        pipes.append(pipe)
    return [pipe.recv() for pipe in pipes]


def summary(ranks: int, measured: list[Row], alone: Row, options: argparse.Namespace) -> Row:
    """One row of the report. Memory and bytes are those of the rank with the most."""
    cpu = [rank["cpu_s"] for rank in measured]
    weight = torch.stack([rank["weight_gradient"] for rank in measured]).sum(0)  # each has that by its own tokens
    exact = alone["weight_gradient"]
    pairs = lengths_of(options).astype(float) ** 2
    tokens = int(lengths_of(options).sum())
    gathered = 6 * 4 * HIDDEN * tokens * options.layers * (ranks - 1) / ranks
    received = max(rank["received_bytes"] for rank in measured)
    return {
        "ranks": ranks,
        "cpu_s": cpu,
        "work_max_over_mean": round(max(cpu) / (sum(cpu) / ranks), 3),
        "work_of_data_parallelism_max_over_mean": round(pairs.max() * ranks / pairs.sum(), 2),
        "kept_bytes": max(rank["kept_bytes"] for rank in measured),
        "peak_over_share": round(max(rank["peak_bytes"] for rank in measured) * ranks / alone["peak_bytes"], 3),
        "kept_over_share": round(max(rank["kept_bytes"] for rank in measured) * ranks / alone["kept_bytes"], 3),
        "peak_bytes": max(rank["peak_bytes"] for rank in measured),
        "received_bytes": received,
        "received_over_k_v_gathered": round(received / gathered, 3) if ranks > 1 else None,
        "loss_off": abs(sum(rank["loss"] for rank in measured) / alone["loss"] - 1),
        "weight_gradient_off": float((weight - exact).abs().max() / exact.abs().max()),
    }


def main() -> None:
    """Measure and print."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--longest", type=int, default=100_000, help="tokens of the long history")
    parser.add_argument("--short", type=int, default=200, help="number of short sequences, of 1 to 200 tokens")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--span", type=int, help="NetworkArgs.max_attention_span")
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        measured = measure(ranks, options)
        rows.append(summary(ranks, measured, (alone := measured[0]) if ranks == 1 else alone, options))
    settings = {name: getattr(options, name) for name in ("longest", "short", "layers", "span")}
    publish(
        {**settings, "heads": HEADS, "head_dim": HEAD_DIM, "torch": torch.__version__, "rows": rows}, options.output
    )


if __name__ == "__main__":
    main()
