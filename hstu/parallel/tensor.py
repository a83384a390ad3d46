"""Tensor parallelism of the dense part: each rank of a group holds some of the heads of every HSTU layer.

A model is built with the weights of a single process and sharded afterwards, in whole heads (layout [head, (u v q k),
channel]): W_uvqk by its outputs, the output norm by its channels and W_o by its inputs. Megatron-core's attributes mark
the sharded parameters. All others are replicated, and get equal gradients on all ranks of the group.

:class:`MegatronHSTULayer` shows what a tensor-parallel layer computes, with Megatron-core's parallel linears. Models
run the fused layer, which :func:`split_encoder` splits, and tests compare it with Megatron's. What its ranks
communicate is in layer_comm.py.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.model.layer import HSTULayer
from hstu.model.stack import FusedHSTULayer, SequenceEncoder
from hstu.ops.dropout import dropout
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionInputs, RelativeBias
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh

with warnings.catch_warnings():  # importing Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
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
        assert isinstance(layer, FusedHSTULayer)
        layer.comm = encoder.comm
        if mesh.tp_size > 1:
            _split_weights(layer, mesh)


def _split_weights(layer: FusedHSTULayer, mesh: Mesh) -> None:
    for name, dim in SPLIT_DIMS.items():
        module, _, parameter = name.partition(".")
        whole = getattr(getattr(layer, module), parameter)
        shard = nn.Parameter(whole.detach().chunk(mesh.tp_size, dim)[mesh.tp_rank].clone())
        set_tensor_model_parallel_attributes(shard, is_parallel=True, dim=dim, stride=1)
        setattr(getattr(layer, module), parameter, shard)


class MegatronHSTULayer(HSTULayer):
    """An HSTU layer of which each rank of ``mesh.tp_group`` has H of the heads, made of Megatron-core's parts.

    U, V, Q and K of a head are outputs of one rank (ColumnParallelLinear), attention needs no other heads, and W_o sums
    over the heads of all ranks (RowParallelLinear). ``state_dict`` is that of the fused layer after
    :func:`split_encoder`, whose weights it loads. Megatron-core's sequence parallelism needs CUDA and is left out.
    """

    def __init__(self, network: NetworkArgs, max_tokens: int, mesh: Mesh, index: int = 0) -> None:
        super().__init__(network, max_tokens, index)
        self.mesh = mesh
        inner = network.num_attention_heads * network.kv_channels
        parts: Any = {
            "config": ModelParallelConfig(
                tensor_model_parallel_size=mesh.tp_size, use_cpu_initialization=True, gradient_accumulation_fusion=False
            ),
            "init_method": nn.init.zeros_,
            "tp_group": mesh.tp_group,
        }
        self.uvqk = ColumnParallelLinear(network.hidden_size, 4 * inner, **parts)
        self.output_norm = nn.LayerNorm(inner // mesh.tp_size, eps=network.norm_epsilon)
        self.out = RowParallelLinear(
            inner, network.hidden_size, bias=False, input_is_parallel=True, skip_bias_add=False, **parts
        )

    def forward(self, x: Tensor, layout: JaggedLayout, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`HSTULayer`. x and the updates are equal on all ranks."""
        x = x if update is None else x + update
        projected, _ = self.uvqk(self.input_norm(x))
        u, v, q, k = F.silu(projected).unflatten(1, (-1, 4, self.network.kv_channels)).unbind(2)  # [T, H, d] each
        bias = None
        if self.bias is not None:  # each rank uses it on its heads alone, so the gradients are summed
            bias = RelativeBias(self._copied(self.bias.position_weight), self._copied(self.bias.time_weight))
        attended = hstu_attention(
            AttentionInputs(q, k, v, layout, self.attention_config, bias), REFERENCE_KERNELS.attention
        )
        gated = self._norm_over_all_heads(attended.flatten(1)) * u.flatten(1)
        stream = self.mesh.tp_rank if self.mesh.tp_size > 1 else None
        update, _ = self.out(dropout(gated, self.network.hidden_dropout, self.training, stream))
        return x, update

    def _norm_over_all_heads(self, own: Tensor) -> Tensor:
        centred = own - self._mean_over_all_heads(own)
        rstd = torch.rsqrt(self._mean_over_all_heads(centred.square()) + self.output_norm.eps)
        return centred * rstd * self.output_norm.weight + self.output_norm.bias

    def _mean_over_all_heads(self, own: Tensor) -> Tensor:
        """Mean over the channels of all ranks [T, 1]; forward and backward are all-reduces."""
        means = reduce_from_tensor_model_parallel_region(own.mean(1, keepdim=True), group=self.mesh.tp_group)
        return self._copied(means / self.mesh.tp_size)

    def _copied(self, whole: Tensor) -> Tensor:
        """``whole`` itself, of which each rank uses its copy: backward sums over the ranks."""
        copy: Tensor = copy_to_tensor_model_parallel_region(whole, group=self.mesh.tp_group)
        return copy
