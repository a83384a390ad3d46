"""Measure how context parallelism spreads one very long history among short ones over the ranks of a group.

    python scripts/bench/context_cpu.py [--longest 100000] [--short 200] [--output docs/benchmarks/context/context.json]

For each number of ranks, which are processes with one thread each, a ranking model runs forward and backward on the
same batch of one long and many short histories, from the looked-up rows of items and actions to their gradients:
inputs, HSTU layers, head and loss. Of each rank: its seconds of the processor, the bytes that autograd keeps, the most
bytes of tensors at one time (weights and ids apart), and the bytes that it receives for attention. Loss and gradients
must be those of one rank. "work_of_data_parallelism" is what the rank with the long history would have: all its pairs
of tokens.
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
from harness import Row, command_line, publish
from torch import Tensor
from torchrec import JaggedTensor

from hstu.config.args import NetworkArgs, RankingArgs
from hstu.data.batches.batch import HSTUBatch, keyed_jagged
from hstu.model.inputs import SequenceFeatures
from hstu.model.ranking import RankingDense
from hstu.model.stack import FusedHSTULayer, SequenceEncoder
from hstu.observe.logging import quiet_libraries
from hstu.ops.comm import Pending
from hstu.ops.kernels import KernelShapes
from hstu.ops.select import select_kernels
from hstu.parallel import mesh as meshes
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh

HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM
HEAD = [64, 8]
"""Widths of the ranking head: a hidden layer, and the logits of eight tasks."""
PAUSE_S = 0.01
"""gloo's thread may be the last to let go of a buffer, and the profiler does not see what other threads free."""


class CountingComm(ProcessGroupComm):
    """Counts the bytes that this rank receives from others for attention."""

    received = 0

    def _exchange(self, by_rank: Tensor) -> Pending:
        self.received += by_rank.nbytes * (self.cp_size - 1) // self.cp_size
        exchanged = super()._exchange(by_rank)

        def result() -> Tensor:
            received = exchanged()
            time.sleep(PAUSE_S)
            return received

        return result


def lengths_of(options: argparse.Namespace) -> np.ndarray:
    """Items of each history, of which each is followed by its action: one long, the others of 1 to 100."""
    short = np.random.default_rng(0).integers(1, 101, options.short)
    return np.concatenate([[options.longest // 2], short])


def batch_of(lengths: np.ndarray) -> HSTUBatch:
    """Histories of which all items are labelled."""
    total = int(lengths.sum())
    ids = dict.fromkeys(("item", "action"), np.zeros(total, np.int64))
    return HSTUBatch(
        features=keyed_jagged(ids, dict.fromkeys(ids, lengths)),
        num_candidates=torch.zeros(len(lengths), dtype=torch.int64),
        num_labels=torch.from_numpy(lengths),
        labels=torch.from_numpy(np.random.default_rng(1).integers(0, 2 ** HEAD[-1], total)),
        user_ids=torch.arange(len(lengths)),
        real_batch_size=len(lengths),
        item_lengths=lengths,
        num_candidates_host=np.zeros_like(lengths),
        num_labels_host=lengths,
    )


def model_of(mesh: Mesh, options: argparse.Namespace) -> tuple[RankingDense, CountingComm]:
    """The model on one rank, and its communication."""
    network = NetworkArgs(
        num_layers=options.layers, hidden_size=HIDDEN, num_attention_heads=HEADS, kv_channels=HEAD_DIM,
        dtype_str="float32", hidden_dropout=0.0, max_attention_span=options.span,
    )  # fmt: skip
    shapes = KernelShapes(HEAD_DIM, HEADS, HIDDEN, HIDDEN, torch.float32, has_bias=False, has_window=bool(options.span))
    kernels = select_kernels(network.kernel_backend, False, mesh.device, shapes)
    torch.manual_seed(0)
    features = SequenceFeatures("item", "action", (), max_items=int(lengths_of(options).max()))
    encoder = SequenceEncoder(network, features, kernels)
    encoder.comm = comm = CountingComm(mesh, sequence_parallel=False)
    for layer in encoder.layers:
        layer.comm = comm  # type: ignore[assignment]
    return RankingDense(encoder, RankingArgs(prediction_head_arch=HEAD, num_tasks=HEAD[-1])), comm


def run_model(mesh: Mesh, options: argparse.Namespace) -> Row:
    """Forward and backward of the model on one rank."""
    model, comm = model_of(mesh, options)
    batch = batch_of(lengths_of(options))
    total = batch.num_labels_total
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    begun = time.process_time()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        rows = {name: torch.randn(total, HIDDEN).requires_grad_() for name in ("item", "action")}
        lengths = batch.features["item"].lengths()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model({name: JaggedTensor(each, lengths=lengths) for name, each in rows.items()}, batch).loss_sum
        (loss / total).backward()
    cpu_s = time.process_time() - begun
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    layer = model.encoder.layers[0]
    assert isinstance(layer, FusedHSTULayer)
    return {
        "cpu_s": round(cpu_s, 2),
        "kept_bytes": sum(size for address, size in kept.items() if address not in weights),
        "peak_bytes": peak_bytes(recorded),
        "received_bytes": comm.received,
        "loss": float(loss.detach()),
        "weight_gradient": layer.uvqk.weight.grad,
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
    """In the process of a rank: send what ``run_model`` measures."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    quiet_libraries()
    mesh = meshes.start(context_parallel_size=ranks)
    torch.set_num_threads(1)
    pipe.send(run_model(mesh, options))
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
    weight = torch.stack([rank["weight_gradient"] for rank in measured]).mean(0)  # as of DDP
    exact = alone["weight_gradient"]
    pairs = lengths_of(options).astype(float) ** 2
    tokens = 2 * int(lengths_of(options).sum())
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
        "loss_off": max(abs(rank["loss"] / alone["loss"] - 1) for rank in measured),
        "weight_gradient_off": float((weight - exact).abs().max() / exact.abs().max()),
    }


def main() -> None:
    """Measure and print."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--longest", type=int, default=100_000, help="tokens of the long history: items and actions")
    parser.add_argument("--short", type=int, default=200, help="number of short histories, of 2 to 200 tokens")
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
