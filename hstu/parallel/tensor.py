"""Tensor parallelism of the dense part: each rank of a group has some of the heads of every HSTU layer.

A model is built whole, with the weights that a single process would have, and cut afterwards: W_uvqk by its outputs,
the output norm by its channels and W_o by its inputs, all in whole heads (layout [head, (u v q k), channel]). The rest
is the same on all ranks of the group, and gets the same gradients.

With sequence parallelism the tokens between the projections are split, too: gathered before W_uvqk, and scattered
where the group's shares of W_o's output are summed. Megatron's own collectives for that need CUDA; ours do not.
"""

from __future__ import annotations

import warnings

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.model.layer import HSTULayer
from hstu.model.stack import HSTUStack, SequenceEncoder
from hstu.ops.layout import JaggedLayout, pad_tokens
from hstu.ops.ranks import Pending, Ranks
from hstu.parallel.collectives import gather_copies, join_rows, split_rows, sum_over_ranks
from hstu.parallel.mesh import Mesh

with warnings.catch_warnings():  # importing Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


def split_encoder(encoder: SequenceEncoder, mesh: Mesh) -> None:
    """Cut an encoder that is still on the host, in place, over the tensor-parallel group; at size 1 nothing is done.

    NetworkArgs.sequence_parallel: split the tokens between the projections, too.
    """
    if mesh.tp_size == 1:
        return
    by_tokens = encoder.network.sequence_parallel
    for layer in encoder.stack.layers:
        assert isinstance(layer, HSTULayer)
        _split_layer(layer, mesh, by_tokens)
    if by_tokens:
        encoder.stack = TokenSplitStack(encoder.stack, mesh.tp_group)


def _split_layer(layer: HSTULayer, mesh: Mesh, by_tokens: bool) -> None:
    layer.ranks = GroupRanks(mesh.tp_group, by_tokens)
    for module, dims in (
        (layer.uvqk, {"weight": 0, "bias": 0}),
        (layer.output_norm, {"weight": 0, "bias": 0}),
        (layer.out, {"weight": 1}),
    ):
        for name, dim in dims.items():
            whole = getattr(module, name)
            part = nn.Parameter(whole.detach().chunk(mesh.tp_size, dim)[mesh.tp_rank].clone())
            set_tensor_model_parallel_attributes(part, is_parallel=True, dim=dim, stride=1)
            setattr(module, name, part)


class GroupRanks(Ranks):
    """The ranks of a tensor-parallel group, each with some heads of a layer, and its weights for them.

    ``by_tokens``: between the projections each has its part of the tokens, too, else all of them.
    """

    def __init__(self, group: dist.ProcessGroup, by_tokens: bool) -> None:
        self.group, self.by_tokens = group, by_tokens
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, own: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return gather_copies(own, self.group)

    def every_token(self, own: Tensor) -> Pending:
        """See :class:`Ranks`."""
        if not self.by_tokens:
            return super().every_token(own)
        rows = own.new_empty((self.count * len(own), own.shape[1]))
        return _pending(rows, dist.all_gather_into_tensor(rows, own.contiguous(), self.group, async_op=True))

    def summed(self, shares: Tensor) -> Pending:
        """See :class:`Ranks`."""
        if not self.by_tokens:
            return _pending(shares, dist.all_reduce(shares, group=self.group, async_op=True))
        own = shares.new_empty((len(shares) // self.count, shares.shape[1]))
        return _pending(own, dist.reduce_scatter_tensor(own, shares, group=self.group, async_op=True))

    def sum_over_heads(self, gradient: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return sum_over_ranks(gradient, self.group)

    def sum_over_tokens(self, gradient: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return sum_over_ranks(gradient, self.group) if self.by_tokens else gradient


def _pending(result: Tensor, work: dist.Work) -> Pending:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait


class TokenSplitStack(HSTUStack):
    """HSTU layers between which each rank has an equal part of the tokens.

    The tokens are filled up to a multiple of the ranks with a further sequence of zeros that no one reads.
    """

    def __init__(self, whole: HSTUStack, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.layers = whole.layers
        self.group = group

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """x: [T, D] → [T, D]."""
        ranks = dist.get_world_size(self.group)
        padding = max(len(x), 1) + -max(len(x), 1) % ranks - len(x)
        padded = F.pad(x, (0, 0, 0, padding))
        tokens = super().forward(split_rows(padded, self.group), pad_tokens(layout, padding))
        return join_rows(tokens, self.group)[: len(x)]
