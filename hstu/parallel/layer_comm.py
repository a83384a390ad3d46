"""Tensor, sequence and context parallelism of the HSTU layers.

- **Tensor parallelism**: each rank has the weights of some heads. W_uvqk is split by its outputs, the output norm by
  its channels, and W_o by its inputs; its partial products are summed. A model is built whole, then split by heads
  (layout [head, (u v q k), channel]). Other parameters are replicated, with equal gradients on all ranks of the group.
- **Sequence parallelism**: between the projections the tokens are split over the same ranks. They are gathered before
  W_uvqk, and the partial products of W_o are reduce-scattered.
- **Context parallelism**: the tokens are split from the inputs to the head. For attention, ranks exchange all heads of
  their own tokens for some heads of a range of the queries and of the keys that these see, and back
  (:mod:`hstu.parallel.attention_shares`). All ranks have equal work for any sequence lengths.

Megatron-core 0.16.1 has mappings for the first two, but they need CUDA and wait for each result. Here a layer is one
autograd function that communicates while it computes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.model.stack import FusedHSTULayer, SequenceEncoder
from hstu.ops.comm import AttentionShare, LayerComm, Pending, TokenSets
from hstu.ops.kernels import AttentionConfig
from hstu.ops.layout import JaggedLayout, pad_tokens
from hstu.parallel.attention_shares import share_attention, within
from hstu.parallel.collectives import gather_copies, join_rows, split_rows, sum_over_ranks
from hstu.parallel.mesh import Mesh
from hstu.parallel.own_time import own_time

with warnings.catch_warnings():  # Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


SPLIT_DIMS = {"uvqk.weight": 0, "uvqk.bias": 0, "output_norm.weight": 0, "output_norm.bias": 0, "out.weight": 1}
"""Split parameter of an HSTU layer → the dimension that is split over the tensor-parallel group."""


def split_encoder(encoder: SequenceEncoder, mesh: Mesh) -> None:
    """Split an encoder in host memory, in place: weights over the tp group, tokens over the cp group.

    With NetworkArgs.sequence_parallel the tokens between the projections are also split over the tp group.
    """
    if mesh.tp_cp_size == 1:
        return
    encoder.comm = ProcessGroupComm(mesh, encoder.network.sequence_parallel)
    for layer in encoder.layers:
        layer.config = replace(layer.config, comm=encoder.comm)
        if mesh.tp_size > 1:
            _split_weights(layer, mesh)


def _split_weights(layer: FusedHSTULayer, mesh: Mesh) -> None:
    for name, dim in SPLIT_DIMS.items():
        module, _, parameter = name.partition(".")
        whole = getattr(getattr(layer, module), parameter)
        shard = whole.detach().chunk(mesh.tp_size, dim)[mesh.tp_rank].clone()
        if isinstance(whole, nn.Parameter):  # else a constant
            shard = nn.Parameter(shard)
            set_tensor_model_parallel_attributes(shard, is_parallel=True, dim=dim, stride=1)
        setattr(getattr(layer, module), parameter, shard)


class ProcessGroupComm(LayerComm):
    """Communication in a tp_cp group. ``sequence_parallel``: split tokens between the projections over the tp ranks."""

    def __init__(self, mesh: Mesh, sequence_parallel: bool) -> None:
        self.rank, self.tp_size, self.cp_size = mesh.tp_cp_rank, mesh.tp_size, mesh.cp_size
        self.cp_rank, self.tp_group, self.cp_group = mesh.cp_rank, mesh.tp_group, mesh.cp_group
        self.sequence_parallel = sequence_parallel

    def all_gather(self, own: Tensor) -> Tensor:
        """See :class:`LayerComm`."""
        with own_time.paused():
            return gather_copies(own, self.tp_group)

    def all_gather_tokens(self, own: Tensor) -> Pending:
        """See :class:`LayerComm`."""
        if not self.sequence_parallel:
            return super().all_gather_tokens(own)
        rows = own.new_empty((self.tp_size * len(own), own.shape[1]))
        return _pending(rows, dist.all_gather_into_tensor(rows, own.contiguous(), self.tp_group, async_op=True))

    def reduce_tokens(self, partial: Tensor) -> Pending:
        """See :class:`LayerComm`."""
        if self.tp_size == 1:
            return super().reduce_tokens(partial)
        if not self.sequence_parallel:
            return _pending(partial, dist.all_reduce(partial, group=self.tp_group, async_op=True))
        own = partial.new_empty((len(partial) // self.tp_size, partial.shape[1]))
        return _pending(own, dist.reduce_scatter_tensor(own, partial, group=self.tp_group, async_op=True))

    def share_attention(
        self, layout: JaggedLayout, config: AttentionConfig, heads: int, has_bias: bool, ranges: bool
    ) -> AttentionShare:
        """See :class:`LayerComm`. Layers with the same settings share the result."""
        if self.cp_size == 1:
            return super().share_attention(layout, config, heads, has_bias, ranges)
        key = ("attention share", config, heads, has_bias, ranges)
        if key not in layout.cache:
            share = share_attention(layout, config, heads, has_bias, self.cp_size, self.cp_rank, ranges)
            layout.cache[key] = share  # must not refer to ``layout``: FSDP follows what a layer gets without end
        whole = [[range(layout.num_tokens)]]
        return layout.cache[key] or AttentionShare(layout, config, None, whole, whole)

    def tokens_to_heads(self, own: Tensor, tokens: TokenSets) -> Pending:
        """See :class:`LayerComm`."""
        if self.cp_size == 1:
            return super().tokens_to_heads(own, tokens)
        by_head = own.chunk(self.cp_size // len(tokens), 1)
        slices, sent, received = self._split(tokens, len(own))
        rows = torch.cat([heads[each] for group in slices for heads in by_head for each in group])
        return self._exchange(rows, sent, received)

    def heads_to_tokens(self, own: Tensor, tokens: TokenSets, out: Tensor | None = None) -> Pending:
        """See :class:`LayerComm`. Rows of several groups are added in float32 or wider."""
        if self.cp_size == 1:
            return super().heads_to_tokens(own, tokens, out)
        per_group = self.cp_size // len(tokens)
        size = sum(map(len, chain(*tokens))) // self.cp_size if out is None else len(out)
        slices, received, sent = self._split(tokens, size)
        exchanged = self._exchange(own, sent, received)

        def result() -> Tensor:
            shape = size, own.shape[1] * per_group, *own.shape[2:]
            target = own.new_empty(shape) if out is None else out
            shared = _rows_of_several(slices, size)
            sums = own.new_zeros((len(shared), *shape[1:]), dtype=torch.promote_types(own.dtype, torch.float32))
            places = [
                (sums_of[piece.start - shared.start : piece.stop - shared.start], True)
                if bounds is shared
                else (target_of[piece.start : piece.stop], False)
                for group in slices
                for target_of, sums_of in zip(target.chunk(per_group, 1), sums.chunk(per_group, 1), strict=True)
                for each in group
                for bounds in (range(shared.start), shared, range(shared.stop, size))
                for piece in [within(range(each.start, each.stop), bounds)]
                if piece
            ]
            parts = exchanged().split([len(place) for place, _ in places])
            for (place, is_sum), rows in zip(places, parts, strict=True):
                place.add_(rows) if is_sum else place.copy_(rows)
            if shared:
                target[shared.start : shared.stop].copy_(sums)
            return target

        return result

    def _split(self, tokens: TokenSets, size: int) -> tuple[list[list[slice]], list[int], list[int]]:
        """Of the ``size`` tokens of this rank, those of each group; how many rows it sends to and gets from each rank.

        The numbers are those of :meth:`tokens_to_heads`.
        """
        holds = [range(rank * size, (rank + 1) * size) for rank in range(self.cp_size)]
        own, per_group = holds[self.cp_rank], self.cp_size // len(tokens)
        of_groups = [[within(each, own) for each in group] for group in tokens]
        slices = [[slice(each.start - own.start, each.stop - own.start) for each in group] for group in of_groups]
        sent = [sum(map(len, group)) for group in of_groups for _ in range(per_group)]
        wanted = tokens[self.cp_rank // per_group]
        return slices, sent, [sum(len(within(each, held)) for each in wanted) for held in holds]

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Pending:
        """Start sending ``sent[r]`` rows to each rank r of the context-parallel group. Returns what ranks sent."""
        result = rows.new_empty((sum(received), *rows.shape[1:]))
        work = dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.cp_group, async_op=True)
        return _pending(result, work)

    def token_ranges(self, num_tokens: int) -> list[range]:
        """See :class:`LayerComm`."""
        bounds = [min(rank * self._tokens_per_rank(num_tokens), num_tokens) for rank in range(self.cp_size + 1)]
        return [range(*pair) for pair in pairwise(bounds)]

    def split_tokens(self, own: Tensor, layout: JaggedLayout) -> tuple[Tensor, JaggedLayout]:
        """See :class:`LayerComm`. With sequence parallelism the tensor-parallel ranks split the range."""
        size = self._tokens_per_rank(layout.num_tokens)
        if size > len(own):
            own = F.pad(own, (0, 0, 0, size - len(own)))
        if self.sequence_parallel:
            own = split_rows(own, self._tp_counts(size), self.tp_group)
        return own, pad_tokens(layout, self.cp_size * size - layout.num_tokens)

    def join_tokens(self, own: Tensor, num_tokens: int) -> Tensor:
        """See :class:`LayerComm`."""
        if self.sequence_parallel:
            own = join_rows(own, self._tp_counts(len(own) * self.tp_size), self.tp_group)
        count = len(self.token_ranges(num_tokens)[self.cp_rank])
        return own if len(own) == count else own[:count]

    def _tokens_per_rank(self, num_tokens: int) -> int:
        share = -(-max(num_tokens, 1) // self.cp_size)
        return share + -share % self.tp_size if self.sequence_parallel else share

    def _tp_counts(self, num_tokens: int) -> list[int]:
        return [num_tokens // self.tp_size] * self.tp_size

    def take_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`LayerComm`."""
        return split_rows(rows, counts, self.cp_group, 1 / self.cp_size)

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`LayerComm`."""
        return join_rows(own, counts, self.cp_group, self.cp_size)

    def sum_over_tokens(self, own: Tensor) -> Tensor:
        """See :class:`LayerComm`."""
        return own if self.cp_size == 1 else self.gather_rows(own[None], [1] * self.cp_size).sum()

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        """See :class:`LayerComm`."""
        return sum_over_ranks(gradient, self.tp_group)

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        """See :class:`LayerComm`."""
        return sum_over_ranks(gradient, self.tp_group) if self.sequence_parallel else gradient


def _rows_of_several(slices: list[list[slice]], size: int) -> range:
    """The least range of a rank's ``size`` rows outside of which exactly one group has each row."""
    groups = np.zeros(size, dtype=np.int64)
    for each in chain(*slices):
        groups[each] += 1
    found = np.flatnonzero(groups != 1)
    return range(int(found[0]), int(found[-1]) + 1) if len(found) else range(0)


def _pending(result: Tensor, work: dist.Work) -> Pending:
    def wait() -> Tensor:
        with own_time.paused():
            work.wait()
        return result

    return wait
