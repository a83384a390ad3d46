"""Time jagged concatenation, rows to token sequences and back, beside FBGEMM's jagged operators.

    python scripts/bench/jagged.py [--device cuda] [--output docs/benchmarks/jagged/cpu.json]

The batch has 128 sequences of width 256, each of 3 context tokens and 107 items on average, each item followed by its
action. Forward puts the rows in the order of tokens, and backward splits the gradients again. "FBGEMM, padded" is
jagged_to_padded_dense, cat and dense_to_jagged. "FBGEMM, jagged_index_select" treats each row as a sequence of one.
Bytes are those of the rows read and written.
"""

from __future__ import annotations

import argparse

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import numpy as np
import torch
from attention import BACKENDS, LABELS, kernels_of, movielens_lengths
from harness import Pass, begin, finish, name_of, operator_command_line, rates, time_passes
from torch import Tensor

from hstu.ops.layout import build_layout, token_order

CONTEXTS = 3


class Bench:
    """The rows of a batch: contexts [B, D] each, items and actions [Σ n, D]."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
        lengths = movielens_lengths(options.sequences, np.random.default_rng(0))
        self.layout = build_layout(
            item_lengths=lengths,
            num_sequences=len(lengths),
            num_contextuals=CONTEXTS,
            num_candidates=None,
            tokens_per_item=2,
            target_group_size=1,
            device=device,
        )
        self.order = token_order(self.layout)
        rows = [len(lengths)] * CONTEXTS + [int(lengths.sum())] * 2
        self.parts = [torch.randn(n, options.width, device=device).to(dtype).requires_grad_() for n in rows]
        self.lengths = torch.from_numpy(lengths).to(device)
        self.longest = int(lengths.max())
        self.ones = torch.ones(sum(rows), dtype=torch.int64, device=device)

    def padded(self) -> Tensor:
        """The tokens by way of padded [B, N, D]."""
        *contexts, items, actions = self.parts
        offsets = [torch.cat([self.lengths.new_zeros(1), 2 * self.lengths.cumsum(0)])]
        interleaved = torch.stack([items, actions], dim=1).flatten(0, 1)
        history = torch.ops.fbgemm.jagged_to_padded_dense(interleaved, offsets, [2 * self.longest], 0.0)
        whole = torch.cat([torch.stack(contexts, dim=1), history], dim=1)
        tokens: Tensor = torch.ops.fbgemm.dense_to_jagged(
            whole, [self.layout.seqlen_offsets], self.order.source.numel()
        )[0]
        return tokens

    def selected(self) -> Tensor:
        """The tokens by selecting rows, each a sequence of one, in the order of tokens."""
        tokens: Tensor = torch.ops.fbgemm.jagged_index_select(torch.cat(self.parts), self.ones, self.order.source)[0]
        return tokens


def passes_of(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Pass]:
    """All variants on the same rows. Raises RuntimeError if their results differ."""
    bench = Bench(options, dtype, device)
    # On a CPU no backend has a kernel of its own for this: PyTorch's serves.
    backend = BACKENDS[device.type][-1]
    jagged_concat = kernels_of(backend, options.width, dtype).jagged_concat
    passes = {
        LABELS.get(backend, f"ours, {backend.value}"): Pass(
            lambda: jagged_concat(bench.parts, bench.order), bench.parts
        ),
        "FBGEMM, padded": Pass(bench.padded, bench.parts),
        "FBGEMM, jagged_index_select": Pass(bench.selected, bench.parts),
    }
    first, *others = (each.forward() for each in passes.values())
    if not all(torch.equal(first, other) for other in others):
        raise RuntimeError("the results of the operators differ")
    return passes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    add = (commands := operator_command_line(__doc__)).add_argument
    add("--sequences", type=int, default=128)
    add("--width", type=int, default=256)
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        passes = passes_of(options, dtype, device)
        moved = 2.0 * next(iter(passes.values())).forward().nbytes
        for name, times in time_passes(passes, device, options.rounds).items():
            rows.append(rates({"variant": name, "dtype": name_of(dtype), **times}, moved, moved, "gb_s"))
    finish(report | {"sequences": options.sequences, "width": options.width, "tokens": rows}, options)


if __name__ == "__main__":
    main()
