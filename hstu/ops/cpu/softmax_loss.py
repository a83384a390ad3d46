"""Softmax losses and L2 normalization by C++ kernels: csrc/softmax_loss.cpp, pool_softmax.cpp and layer.cpp."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.cpu.build import Arguments, fields, float32, int32, int64, library, pointer
from hstu.ops.kernels import Loss, Negatives
from hstu.ops.pytorch import softmax_loss
from hstu.ops.pytorch.softmax_loss import first_indices

DRAWS_PER_PACKED_ROW = 8
"""From this many draws per row of the pool, copying its rows to aligned memory pays."""
POOL_BLOCK_ELEMENTS, POOL_BLOCK_ROWS = 1 << 18, 512
"""Scores per block (1 MiB stays in the cache of a core), and its least rows: products are fastest near a square."""
POOL_KEPT_ELEMENTS, POOL_KEPT_ROWS = 1 << 27, 128
"""Scores kept for the gradient of the pool (512 MiB), and the least rows to which they belong: if possible as many as
the width, so that visits of kept scores and of the gradient move equally many bytes."""
LEAST_WIDTH = 16
"""Numbers per vector: one AVX-512 register. Shorter vectors are padded."""


class _LossArguments(Arguments):
    """HstuSampledSoftmax of csrc/softmax_loss.cpp."""

    _fields_ = fields(
        (pointer, "queries positives pool draws target_ids pool_ids log_weights"),
        (pointer, "first sequences positions"),
        (pointer, "losses weights grad_queries grad_positives grad_pool tags packed"),
        (int64, "num_queries num_draws pool_size width padded"),
        (float32, "temperature"),
        (int32, "threads"),
    )


def sampled_softmax_loss(vectors: Sequence[Tensor], negatives: Negatives, wants_gradients: bool) -> Loss:
    """Softmax against R negatives per query, for float32 vectors of at most 256 numbers."""
    draws, log_weights, seen, width = negatives.draws, negatives.log_weights, negatives.seen, vectors[0].shape[1]
    assert draws is not None
    vectors = queries, positives, pool = [_at_least(LEAST_WIDTH, each) for each in vectors]
    padded, losses = library().hstu_packed_width(int64(queries.shape[1])), torch.empty(len(queries))
    arguments = _LossArguments(
        num_queries=len(queries),
        num_draws=draws.shape[1],
        pool_size=len(pool),
        width=queries.shape[1],
        padded=padded,
        temperature=negatives.temperature,
    )
    arguments.set(
        queries=queries,
        positives=positives,
        pool=pool,
        draws=draws.int().contiguous(),
        target_ids=negatives.target_ids.long().contiguous(),
        pool_ids=negatives.pool_ids.long().contiguous(),
        log_weights=None if log_weights is None else log_weights.contiguous(),
        losses=losses,
        tags=torch.empty(len(pool), dtype=torch.uint8),
        **({} if seen is None else seen._asdict()),
    )
    if draws.numel() >= DRAWS_PER_PACKED_ROW * len(pool):
        arguments.set(packed=torch.empty(len(pool), padded))
    gradients = [torch.empty(each.shape) for each in vectors if wants_gradients]
    if wants_gradients:
        arguments.set(grad_queries=gradients[0], grad_positives=gradients[1], grad_pool=gradients[2])
        arguments.set(weights=torch.empty(draws.shape))
    library().hstu_sampled_softmax(ctypes.byref(arguments))
    return losses.sum(), [gradient[:, :width] for gradient in gradients]


def _at_least(width: int, vectors: Tensor) -> Tensor:
    """Zero-pad vectors shorter than ``width``, and make their rows contiguous."""
    missing = width - vectors.shape[1]
    return (F.pad(vectors, (0, missing)) if missing > 0 else vectors).contiguous()


class _PoolArguments(Arguments):
    """HstuPoolSoftmax of csrc/pool_softmax.cpp."""

    _fields_ = fields(
        (pointer, "scores log_weights keys key_rows marks peaks totals"),
        (int64, "rows columns key_pitch"),
        (int32, "ordered threads"),
    )


def in_blocks(vectors: Sequence[Tensor], negatives: Negatives) -> softmax_loss.InBlocks:
    """Products by PyTorch, the rest by C++. In float64 PyTorch computes everything."""
    queries, _, pool = vectors
    if queries.dtype == torch.float64:
        return softmax_loss.in_blocks(vectors, negatives)
    log_weights, seen = negatives.log_weights, negatives.seen
    if seen is None:
        keys, marks = _as_int32(negatives.pool_ids, negatives.target_ids)
        key_rows = None
    else:
        keys, marks, key_rows = seen.first, seen.positions, seen.sequences

    def exponentials(scores: Tensor, rows: slice, columns: slice, peaks: Tensor, totals: Tensor) -> None:
        arguments = _PoolArguments(
            rows=len(scores), columns=scores.shape[1], key_pitch=len(pool), ordered=seen is not None
        )
        arguments.set(scores=scores, keys=keys[..., columns], marks=marks[rows], peaks=peaks, totals=totals)
        arguments.set(key_rows=None if key_rows is None else key_rows[rows])
        arguments.set(log_weights=None if log_weights is None else log_weights[columns])
        library().hstu_pool_softmax(ctypes.byref(arguments))

    kept_rows = max(POOL_KEPT_ROWS, queries.shape[1])
    least_rows = kept_rows if kept_rows * len(pool) <= POOL_KEPT_ELEMENTS else POOL_BLOCK_ROWS
    shape = softmax_loss.block_shape(len(queries), len(pool), POOL_BLOCK_ELEMENTS, least_rows)
    return exponentials, (*shape, POOL_KEPT_ELEMENTS)


def _as_int32(pool_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int32 numbers of pool and targets that are equal exactly if their int64 ids are equal."""
    short = pool_ids.int(), target_ids.int()
    if all(bool((a == b).all()) for a, b in zip(short, (pool_ids, target_ids), strict=True)):
        return short
    ordered = pool_ids.sort().values
    return torch.searchsorted(ordered, pool_ids).int(), first_indices(target_ids, ordered).int()


class _UnitArguments(Arguments):
    """HstuUnit of csrc/layer.cpp."""

    _fields_ = fields(
        (pointer, "x unit grad_out out norms grad_x"),
        (int64, "rows width"),
        (float32, "eps"),
        (int32, "threads"),
    )


def l2_normalize(vectors: Tensor, eps: float) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.l2_normalize`."""
    if vectors.dtype == torch.float64:
        return softmax_loss.l2_normalize(vectors, eps)
    return _Unit.apply(vectors.float(), eps)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        out, norms = torch.empty(x.shape), torch.empty(len(x))
        arguments = _UnitArguments(rows=len(x), width=x.shape[1], eps=eps)
        arguments.set(x=x.contiguous(), out=out, norms=norms)
        library().hstu_unit(ctypes.byref(arguments), 0)
        ctx.save_for_backward(out, norms)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        unit, norms = ctx.saved_tensors
        grad_x = torch.empty(unit.shape)
        arguments = _UnitArguments(rows=len(unit), width=unit.shape[1], eps=ctx.eps)
        arguments.set(unit=unit, grad_out=grad_out.contiguous(), norms=norms, grad_x=grad_x)
        library().hstu_unit(ctypes.byref(arguments), 1)
        return grad_x, None
