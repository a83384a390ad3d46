"""Tensor parallelism of the dense part: each rank of a group holds some of the heads of every HSTU layer.

A model is built with the weights of a single process and sharded afterwards, in whole heads (layout [head, (u v q k),
channel]): W_uvqk by its outputs, the output norm by its channels and W_o by its inputs. Megatron-core's attributes mark
the sharded parameters. All others are replicated, and get equal gradients on all ranks of the group.

With sequence parallelism the tokens between the projections are sharded, too: they are gathered before W_uvqk, and the
partial products of W_o are reduce-scattered. Megatron-core 0.16.1 has mappings for that. They need CUDA, and each is an
autograd function that waits for its result, whereas a layer is one autograd function that communicates while it
computes.
"""

from __future__ import annotations

import warnings

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.model.stack import HSTULayer, SequenceEncoder
from hstu.ops.comm import Pending, TensorParallelComm
from hstu.ops.layout import JaggedLayout, pad_tokens
from hstu.parallel.collectives import gather_copies, join_rows, split_rows, sum_over_ranks
from hstu.parallel.mesh import Mesh

with warnings.catch_warnings():  # importing Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


SPLIT_DIMS = {"uvqk.weight": 0, "uvqk.bias": 0, "output_norm.weight": 0, "output_norm.bias": 0, "out.weight": 1}
"""Sharded parameter of an HSTU layer → the dimension along which it is sharded over the tensor-parallel group."""


def split_encoder(encoder: SequenceEncoder, mesh: Mesh) -> None:
    """Shard an encoder in host memory, in place, over the tensor-parallel group; a group of one changes nothing.

    With NetworkArgs.sequence_parallel the tokens between the projections are sharded, too.
    """
    if mesh.tp_size == 1:
        return
    encoder.comm = ProcessGroupComm(mesh.tp_group, encoder.network.sequence_parallel)
    for layer in encoder.layers:
        assert isinstance(layer, HSTULayer)
        layer.comm = encoder.comm
        _split_weights(layer, mesh)


def _split_weights(layer: HSTULayer, mesh: Mesh) -> None:
    for name, dim in SPLIT_DIMS.items():
        module, _, parameter = name.partition(".")
        whole = getattr(getattr(layer, module), parameter)
        shard = nn.Parameter(whole.detach().chunk(mesh.tp_size, dim)[mesh.tp_rank].clone())
        set_tensor_model_parallel_attributes(shard, is_parallel=True, dim=dim, stride=1)
        setattr(getattr(layer, module), parameter, shard)


class ProcessGroupComm(TensorParallelComm):
    """The ranks of a tensor-parallel group, each with its heads of a layer and the weights for them.

    ``sequence_parallel``: between the projections each rank holds its part of the tokens; else it holds all.
    """

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, own: Tensor) -> Tensor:
        """See :class:`TensorParallelComm`."""
        return gather_copies(own, self.group)

    def all_gather_tokens(self, own: Tensor) -> Pending:
        """See :class:`TensorParallelComm`."""
        if not self.sequence_parallel:
            return super().all_gather_tokens(own)
        rows = own.new_empty((self.size * len(own), own.shape[1]))
        return _pending(rows, dist.all_gather_into_tensor(rows, own.contiguous(), self.group, async_op=True))

    def reduce_tokens(self, partial: Tensor) -> Pending:
        """See :class:`TensorParallelComm`."""
        if not self.sequence_parallel:
            return _pending(partial, dist.all_reduce(partial, group=self.group, async_op=True))
        own = partial.new_empty((len(partial) // self.size, partial.shape[1]))
        return _pending(own, dist.reduce_scatter_tensor(own, partial, group=self.group, async_op=True))

    def split_tokens(self, x: Tensor, layout: JaggedLayout) -> tuple[Tensor, JaggedLayout]:
        """See :class:`TensorParallelComm`. Zero tokens pad the batch to a multiple of the number of ranks."""
        if not self.sequence_parallel:
            return x, layout
        padding = max(len(x), 1) + -max(len(x), 1) % self.size - len(x)
        return split_rows(F.pad(x, (0, 0, 0, padding)), self.group), pad_tokens(layout, padding)

    def join_tokens(self, own: Tensor, num_tokens: int) -> Tensor:
        """See :class:`TensorParallelComm`."""
        return join_rows(own, self.group)[:num_tokens] if self.sequence_parallel else own

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        """See :class:`TensorParallelComm`."""
        return sum_over_ranks(gradient, self.group)

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        """See :class:`TensorParallelComm`."""
        return sum_over_ranks(gradient, self.group) if self.sequence_parallel else gradient


def _pending(result: Tensor, work: dist.Work) -> Pending:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait
