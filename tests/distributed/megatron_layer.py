"""A readable tensor-parallel HSTU layer in Megatron-core's linears. Tests compare it with the split fused layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.model.layer import HSTULayer, layer_norm
from hstu.ops.dropout import dropout
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionInputs, RelativeBias
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel.mesh import Mesh

with warnings.catch_warnings():  # Megatron warns about optional CUDA packages that are not used here
    warnings.simplefilter("ignore")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )


class MegatronHSTULayer(HSTULayer):
    """An HSTU layer built from Megatron-core, with H of the heads on each rank of ``mesh.tp_group``.

    ColumnParallelLinear computes U, V, Q and K of this rank's heads, attention works per head, and RowParallelLinear
    (W_o) sums over all heads. It loads the state dict of a split fused layer. Sequence parallelism, which needs CUDA in
    Megatron-core, is left out.
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
        self.uvqk = ColumnParallelLinear(network.hidden_size, 4 * inner, bias=network.uvqk_bias, **parts)
        self.output_norm = layer_norm(network, inner // mesh.tp_size)
        self.out = RowParallelLinear(
            inner, network.hidden_size, bias=network.output_bias, input_is_parallel=True, skip_bias_add=False, **parts
        )

    def forward(self, x: Tensor, layout: JaggedLayout, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`HSTULayer`. x and the updates are equal on all ranks."""
        x = x if update is None else x + update
        projected, _ = self.uvqk(self.input_norm(x))
        u, v, q, k = F.silu(projected).unflatten(1, (-1, 4, self.network.kv_channels)).unbind(2)  # [T, H, d] each
        bias = None
        if self.bias is not None:  # each rank applies it to its own heads only, so its gradients are summed
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
        """Return ``whole``, which is equal on all ranks. Backward: sums the ranks' gradients."""
        copy: Tensor = copy_to_tensor_model_parallel_region(whole, group=self.mesh.tp_group)
        return copy
