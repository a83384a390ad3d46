"""Tensor parallelism of the dense part: each rank of a group holds some of the heads of every HSTU layer.

A model is built with the weights of a single process and sharded afterwards, in whole heads (layout [head, (u v q k),
channel]): W_uvqk by its outputs, the output norm by its channels and W_o by its inputs. Megatron-core's attributes mark
the sharded parameters. All others are replicated, and get equal gradients on all ranks of the group.

layer_comm.py has what the ranks of a layer communicate.
"""

from __future__ import annotations

import warnings

from torch import nn

from hstu.model.stack import HSTULayer, SequenceEncoder
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh

with warnings.catch_warnings():  # importing Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


SPLIT_DIMS = {"uvqk.weight": 0, "uvqk.bias": 0, "output_norm.weight": 0, "output_norm.bias": 0, "out.weight": 1}
"""Sharded parameter of an HSTU layer → the dimension along which it is sharded over the tensor-parallel group."""


def split_encoder(encoder: SequenceEncoder, mesh: Mesh) -> None:
    """Split an encoder in host memory, in place: its weights over the tp group, its tokens over the cp group.

    With NetworkArgs.sequence_parallel the tokens between the projections are split over the tp group, too.
    """
    if mesh.tp_cp_size == 1:
        return
    encoder.comm = ProcessGroupComm(mesh, encoder.network.sequence_parallel)
    for layer in encoder.layers:
        assert isinstance(layer, HSTULayer)
        layer.comm = encoder.comm
        if mesh.tp_size > 1:
            _split_weights(layer, mesh)


def _split_weights(layer: HSTULayer, mesh: Mesh) -> None:
    for name, dim in SPLIT_DIMS.items():
        module, _, parameter = name.partition(".")
        whole = getattr(getattr(layer, module), parameter)
        shard = nn.Parameter(whole.detach().chunk(mesh.tp_size, dim)[mesh.tp_rank].clone())
        set_tensor_model_parallel_attributes(shard, is_parallel=True, dim=dim, stride=1)
        setattr(getattr(layer, module), parameter, shard)
