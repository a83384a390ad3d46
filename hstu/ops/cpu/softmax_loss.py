"""See :mod:`hstu.ops.softmax_loss`; the arithmetic is in csrc/softmax_loss.cpp.

As there, forward makes the gradients, and backward scales them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from hstu.ops.cpu.library import address, float32, int32, int64, library, num_threads, pointer
from hstu.ops.pytorch.softmax_loss import SoftmaxLoss

MOST_PARTIAL_BYTES = 2**27
"""Of gradients of the pool that are summed apart by the threads; beyond, each thread looks at all draws."""


class _Arguments(ctypes.Structure):
    """Mirrors HstuSampledSoftmax of csrc/softmax_loss.cpp: same names, same order."""

    _fields_ = [  # ctypes wants a plain list
        *((name, pointer) for name in ("queries", "positives", "pool", "draws", "target_ids", "pool_ids")),
        *((name, pointer) for name in ("losses", "weights", "grad_queries", "grad_positives", "grad_pool")),
        *((name, pointer) for name in ("packed", "partial")),
        *((name, int64) for name in ("num_queries", "num_draws", "pool_size", "width", "padded", "parts")),
        ("temperature", float32),
        ("threads", int32),
    ]


class SampledSoftmaxLoss(SoftmaxLoss):
    """Softmax against R negatives a query; vectors float32, at most WIDEST_ROW wide."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        positives: Tensor,
        pool: Tensor,
        draws: Tensor,
        target_ids: Tensor,
        pool_ids: Tensor,
        temperature: float,
    ) -> Tensor:
        """See hstu.ops.softmax_loss.sampled_softmax_loss."""
        given = {
            "queries": queries.contiguous(),
            "positives": positives.contiguous(),
            "pool": pool.contiguous(),
            "draws": draws.int().contiguous(),
            "target_ids": target_ids.long().contiguous(),
            "pool_ids": pool_ids.long().contiguous(),
        }
        num_queries, num_draws = draws.shape
        padded = library().hstu_packed_width(int64(queries.shape[1]))
        threads = num_threads()
        partial_shape = (threads, len(pool), padded)
        made = {"losses": torch.empty(num_queries), "packed": torch.empty(len(pool), padded)}
        if any(ctx.needs_input_grad):
            names = ("queries", "positives", "pool")
            made |= {f"grad_{name}": torch.empty(given[name].shape) for name in names}
            made["weights"] = torch.empty(num_queries, num_draws)
            if threads * len(pool) * padded * 4 <= MOST_PARTIAL_BYTES:
                made["partial"] = torch.zeros(partial_shape)
        arguments = _Arguments(
            **{name: address(tensor) for name, tensor in (given | made).items()},
            num_queries=num_queries,
            num_draws=num_draws,
            pool_size=len(pool),
            width=queries.shape[1],
            padded=padded,
            parts=threads,
            temperature=temperature,
            threads=threads,
        )
        library().hstu_sampled_softmax(ctypes.byref(arguments))
        if "weights" in made:
            ctx.save_for_backward(made["grad_queries"], made["grad_positives"], made["grad_pool"])
        return made["losses"].sum()
