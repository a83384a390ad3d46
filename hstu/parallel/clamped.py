"""FBGEMM's fused tables with rows' gradients clamped (OptimizerArgs.sparse_max_gradient).

FBGEMM has gradient_clipping, which clamps what each lookup of a row contributes before it sums them: an id that occurs
twice moves up to twice as far, and a negative that several ranks look up has another gradient than one that a single
process looks up once. Here a row's gradient is summed first, over all lookups of the global batch, as it is for every
other kind of table, so that the update does not depend on ranks, micro-batches or kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding


class ClampedFusedEmbedding(BatchedFusedEmbedding):
    """TorchRec's fused kernel of a group of tables, the gradient of each row cut to [-max_gradient, max_gradient].

    The limit is ``max_gradient`` of the group's fused_params, which FBGEMM takes and ignores unless told to clip, too.
    """

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Rows float32 [tokens, columns]."""
        rows: Tensor = super().forward(features)
        if rows.requires_grad:
            rows = _ClampRows.apply(rows, self._rows_of(features), self.config.fused_params["max_gradient"])
        return rows

    def _rows_of(self, features: KeyedJaggedTensor) -> Tensor:
        """Which row each token looks up, int64 [tokens], those of all tables of the group told apart."""
        ids, ends, parts, key, first_row = features.values(), [0, *features.offset_per_key()[1:]], [], 0, 0
        for table in self.config.embedding_tables:
            start, stop = ends[key], ends[key + table.num_features()]
            parts.append(ids[start:stop] + first_row)
            key, first_row = key + table.num_features(), first_row + table.local_rows
        return torch.cat(parts)


class _ClampRows(torch.autograd.Function):
    """Nothing forward; backward hands a row's sum, clamped, to the first token that looked it up, the others get 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, looked_up: Tensor, rows: Tensor, limit: float) -> Tensor:
        ctx.rows, ctx.limit = rows, limit  # type: ignore[attr-defined]
        return looked_up.view_as(looked_up)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return clamp_row_sums(gradients[0], ctx.rows, ctx.limit), None, None  # type: ignore[attr-defined]


def clamp_row_sums(gradients: Tensor, rows: Tensor, limit: float) -> Tensor:
    """At the first place of each row the sum over all of its places, clamped to [-limit, limit]; 0 at the others.

    ``gradients``: [n, D], as the result; ``rows``: int64 [n]. Sums go in the order of the places, without atomics, and
    the device is asked for no size.
    """
    ordered, order = rows.sort(stable=True)
    starts_run = torch.ones_like(ordered, dtype=torch.bool)
    starts_run[1:] = ordered[1:] != ordered[:-1]
    places = torch.arange(len(rows), device=rows.device)
    run_start = torch.where(starts_run, places, 0).cummax(0).values if len(rows) else places
    first = torch.empty_like(order)
    first[order] = order[run_start]
    sums = torch.zeros_like(gradients)
    if sums.device.type == "cpu":
        sums.index_add_(0, first, gradients)
    else:  # where index_add_ has atomics, and this sorts
        sums.index_put_((first,), gradients, accumulate=True)
    return sums.clamp_(-limit, limit)
