"""Softmax losses of retrieval and L2 normalization of their vectors in plain PyTorch, on any device."""

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hstu.ops.kernels import Loss, Negatives

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of the largest temporary block: fits a CPU's cache; keeps a GPU busy (256 MiB)."""
MIN_BLOCK_ROWS = 256
"""Minimum rows of a block, however large the pool is: fewer make matrix products slow."""


def l2_normalize(vectors: Tensor, eps: float) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.l2_normalize`."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=eps)


Exponentials = Callable[[Tensor, slice, slice, Tensor, Tensor], None]
"""(scores of a block [m, n], its rows, its columns, peaks [m], totals [m]); updates all tensors in place.

Raises the peaks to about the largest visible score. Replaces scores by exponentials relative to them, 0 if hidden.
Adds their sums to the totals, and rescales these to the new peaks.
"""
InBlocks = tuple[Exponentials, tuple[int, int, int]]
"""How to compute the scores of a pool block by block: rows and columns of a block, and the most scores kept."""


def in_blocks(vectors: Sequence[Tensor], negatives: Negatives) -> InBlocks:
    """By PyTorch."""
    (queries, _, pool), seen = vectors, negatives.seen

    def exponentials(scores: Tensor, rows: slice, columns: slice, peaks: Tensor, totals: Tensor) -> None:
        if negatives.log_weights is not None:
            scores += negatives.log_weights[columns]
        if seen is None:
            hidden = negatives.target_ids[rows, None] == negatives.pool_ids[columns]
        else:
            hidden = seen.first[:, columns].index_select(0, seen.sequences[rows]) <= seen.positions[rows, None]
        old_peaks = peaks.clone()
        torch.maximum(peaks, scores.masked_fill_(hidden, -math.inf).amax(dim=1), out=peaks)
        scores.sub_(peaks[:, None]).exp_()
        totals.mul_(old_peaks.sub_(peaks).exp_()).add_(scores.sum(dim=1))

    elements = BLOCK_ELEMENTS.get(queries.device.type, BLOCK_ELEMENTS["cuda"])
    return exponentials, (*block_shape(len(queries), len(pool), elements), elements)


def pool_softmax_loss(
    blocks_of: Callable[[Sequence[Tensor], Negatives], InBlocks],
    vectors: Sequence[Tensor],
    negatives: Negatives,
    wants_gradients: bool,
) -> Loss:
    """Softmax against the whole pool. The gradient of the pool needs the totals of rows, so it takes a second pass over
    their blocks, which are computed again if they are too large to be kept."""
    exponentials, (block_rows, block_columns, most_kept) = blocks_of(vectors, negatives)
    (queries, positives, pool), temperature = vectors, negatives.temperature
    positive_logits = (queries * positives).sum(dim=1) / temperature
    losses = torch.empty_like(positive_logits)
    grad_queries, grad_pool = torch.zeros_like(queries), torch.zeros_like(pool)
    scaled_queries = queries / temperature
    keeps = wants_gradients and block_rows * len(pool) <= most_kept
    memory = _memory_of_scores(queries, block_rows * (len(pool) if keeps else block_columns))

    for rows in _slices(len(queries), block_rows):
        row_queries, row_logits = scaled_queries[rows], positive_logits[rows]
        peaks, totals, computed = row_logits.clone(), torch.zeros_like(row_logits), []
        for columns in _slices(len(pool), block_columns):
            items, start = pool[columns], len(row_logits) * columns.start if keeps else 0
            block = memory[start : start + len(row_logits) * len(items)].view(-1, len(items))
            exponentials(torch.mm(row_queries, items.t(), out=block), rows, columns, peaks, totals)
            computed += [(columns, items, block, peaks.clone())] if wants_gradients else []
        losses[rows] = target_losses(row_logits, peaks + totals.log())
        log_norms = row_logits + losses[rows]
        for columns, items, block, block_peaks in computed:
            if not keeps:
                exponentials(torch.mm(row_queries, items.t(), out=block), rows, columns, peaks, totals)
                block_peaks = peaks
            row_scales = torch.exp(block_peaks - log_norms)[:, None] / temperature
            grad_queries[rows].addcmul_(row_scales, block @ items)
            # Reading zeros of the first rows would make the system provide each page of a large gradient twice.
            grad_pool[columns].addmm_(block.t(), queries[rows] * row_scales, beta=float(rows.start > 0))
    if not wants_gradients:
        return losses.sum(), ()
    return with_gradients((grad_queries, grad_pool), queries, positives, losses, temperature)


def sampled_softmax_loss(vectors: Sequence[Tensor], negatives: Negatives, wants_gradients: bool) -> Loss:
    """Softmax against R negatives per query. The largest temporaries are [M, R]."""
    queries, positives, pool = vectors
    draws, seen, temperature = negatives.draws, negatives.seen, negatives.temperature
    assert draws is not None
    positive_logits = (queries * positives).sum(dim=1) / temperature
    logits = _draw_scores(queries, pool, draws).div_(temperature)
    if negatives.log_weights is not None:
        logits += negatives.log_weights[draws]
    if seen is None:
        hidden = negatives.pool_ids[draws] == negatives.target_ids[:, None]
    else:
        hidden = seen.first[seen.sequences[:, None], draws] <= seen.positions[:, None]
    logits.masked_fill_(hidden, -math.inf)
    losses = target_losses(positive_logits, logits.logsumexp(dim=1))
    if not wants_gradients:
        return losses.sum(), ()
    weights = logits.sub_((positive_logits + losses)[:, None]).exp_().div_(temperature)
    grad_queries = _weighted_row_sums(pool, draws, weights)
    grad_pool = _weighted_row_sums_transposed(queries, draws, weights, len(pool))
    return with_gradients((grad_queries, grad_pool), queries, positives, losses, temperature)


_of_thread = threading.local()


def _memory_of_scores(like: Tensor, elements: int) -> Tensor:
    """Uninitialised memory, on a CPU the same for each loss: new pages would take as long as a matrix product."""
    if like.device.type != "cpu" or isinstance(like, FakeTensor):
        return like.new_empty(elements)
    memory: Tensor = getattr(_of_thread, "scores", torch.empty(0))
    if memory.dtype != like.dtype or len(memory) < elements:
        memory = _of_thread.scores = like.new_empty(elements)
    return memory[:elements]


def target_losses(positive_logits: Tensor, negative_log_totals: Tensor) -> Tensor:
    """−log of the target's probability: exact for small losses, and 0 without negatives (a log total of −inf)."""
    return torch.logaddexp(torch.zeros_like(positive_logits), negative_log_totals - positive_logits)


def first_indices(ids: Tensor, ordered: Tensor) -> Tensor:
    """For each id, the index of its first occurrence in ``ordered``, ascending int64 [S]; S if it is absent."""
    found = torch.searchsorted(ordered, ids)
    padded = F.pad(ordered, (0, 1), value=torch.iinfo(torch.int64).min)  # an id beyond the end is greater
    return torch.where(padded[found] == ids, found, len(ordered))


def with_gradients(
    of_negatives: tuple[Tensor, Tensor], queries: Tensor, positives: Tensor, losses: Tensor, temperature: float
) -> Loss:
    """The loss with all gradients. of_negatives: those of queries and pool through the negatives; changed."""
    # A target's probability p is exp(−loss). Near 1, p − 1 would lose digits, so use expm1.
    weights = torch.expm1(-losses).div_(temperature)[:, None]
    grad_queries, grad_pool = of_negatives
    return losses.sum(), (grad_queries.addcmul_(weights, positives), weights * queries, grad_pool)


def _draw_scores(queries: Tensor, pool: Tensor, draws: Tensor) -> Tensor:
    """[M, R]: inner products of each query with its drawn pool rows."""
    if queries.device.type == "cpu" and draws.numel() and len(pool) > draws.shape[1]:
        return _sampled_product(queries, pool, draws)
    scores = queries.new_empty(draws.shape)
    elements = BLOCK_ELEMENTS.get(queries.device.type, BLOCK_ELEMENTS["cuda"])
    for rows in _slices(len(queries), max(1, elements // max(1, len(pool)))):
        scores[rows] = (queries[rows] @ pool.t()).gather(1, draws[rows].long())
    return scores


def _sampled_product(queries: Tensor, pool: Tensor, draws: Tensor) -> Tensor:
    """Scores by a sampled matrix product without gathers: on a CPU 13 × faster than gathered rows and bmm."""
    row_starts = torch.arange(0, draws.numel() + 1, draws.shape[1], dtype=draws.dtype, device=draws.device)
    zeros, size = queries.new_zeros(draws.numel()), (len(queries), len(pool))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # Unchecked: columns are neither sorted nor distinct, which sampled_addmm does not need.
        pattern = torch.sparse_csr_tensor(row_starts, draws.flatten(), zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, queries, pool.t(), beta=0.0).values().view(draws.shape)


def _weighted_row_sums(pool: Tensor, draws: Tensor, weights: Tensor) -> Tensor:
    """[M, D]: for each query, the weighted sum of its drawn pool rows."""
    if not draws.numel():
        return pool.new_zeros(len(draws), pool.shape[1])
    return F.embedding_bag(draws, pool, per_sample_weights=weights, mode="sum")


def _weighted_row_sums_transposed(queries: Tensor, draws: Tensor, weights: Tensor, pool_size: int) -> Tensor:
    """[S, D]: per pool row, the weighted sum of queries that drew it. Sorting avoids atomics: equal bits each time."""
    if not draws.numel():
        return queries.new_zeros(pool_size, queries.shape[1])
    drawn, order = draws.flatten().sort(stable=True)
    run_starts = torch.searchsorted(drawn, torch.arange(pool_size, dtype=drawn.dtype, device=drawn.device))
    query_rows = order // draws.shape[1]
    return F.embedding_bag(query_rows, queries, run_starts, per_sample_weights=weights.flatten()[order], mode="sum")


def block_shape(rows: int, columns: int, elements: int, least_rows: int = MIN_BLOCK_ROWS) -> tuple[int, int]:
    """Rows and columns of a block of about ``elements`` scores: whole matrix rows unless too few would fit."""
    block_rows = max(1, min(rows, max(least_rows, elements // max(1, columns))))
    most = elements // block_rows  # of it, an odd number of cache lines: at powers of two, rows share few cache sets
    return block_rows, max(1, min(columns, most if most < 16 else most - (most - 16) % 32))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
