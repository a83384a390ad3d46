"""Jagged concatenation, interleaving and splitting by Triton kernels: rows go straight to their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.jagged import TokenOrder
from hstu.ops.triton.rows import move_rows


def jagged_concat(parts: Sequence[Tensor], order: TokenOrder) -> Tensor:
    """See :func:`hstu.ops.jagged.jagged_concat`. Parts may have any strides; they are not concatenated first."""
    tokens: Tensor = _Concat.apply(order.inverse, *parts)
    return tokens


def jagged_split(tokens: Tensor, order: TokenOrder, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The reverse of jagged_concat: tokens [T, D] → parts of ``lengths`` rows each."""
    parts: tuple[Tensor, ...] = _Split.apply(order.inverse, tuple(lengths), tokens)
    return parts


def _concat(inverse: Tensor, parts: Sequence[Tensor]) -> Tensor:
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    tokens = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=dtype, device=parts[0].device)
    for part, places in zip(parts, inverse.split([len(part) for part in parts]), strict=True):
        move_rows(part, tokens, places, scatter=True)
    return tokens


def _split(inverse: Tensor, lengths: Sequence[int], tokens: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for places in inverse.split(list(lengths)):
        parts.append(torch.empty(len(places), tokens.shape[1], dtype=tokens.dtype, device=tokens.device))
        move_rows(tokens, parts[-1], places, scatter=False)
    return tuple(parts)


class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inverse: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.lengths, ctx.dtypes = [len(part) for part in parts], [part.dtype for part in parts]
        return _concat(inverse, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = _split(ctx.saved_tensors[0], ctx.lengths, grad)
        return None, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inverse: Tensor, lengths: tuple[int, ...], tokens: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inverse)
        return _split(inverse, lengths, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _concat(ctx.saved_tensors[0], grads)
