"""The fused HSTU layer against the one of Megatron-core's parallel linears with the same weight shards."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.model.inputs import SequenceFeatures
from hstu.model.layer import HSTULayer, layer_norm
from hstu.model.stack import FusedHSTULayer, SequenceEncoder
from hstu.ops.dropout import dropout
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionInputs, RelativeBias
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel import mesh as mesh_module
from hstu.parallel.layer_comm import split_encoder
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import run_ranks
from tests.ops.oracle import User
from tests.ops.strategies import Batch

HIDDEN, HEADS, WIDTH, MAX_ITEMS = 12, 12, 3, 9
BATCH = Batch((User(9, 2, tuple(range(0, 1100, 100))), User(4, 0, (1, 1, 90, 10**9)), User(6, 0, (3,) * 6)), 1, 1, 1)


@pytest.mark.parametrize(("tp_size", "is_published", "count"), [(2, True, 7), (2, False, 11), (3, False, 11)])
def test_outputs_and_gradients_equal_those_of_megatrons_layers(tp_size: int, is_published: bool, count: int) -> None:
    for errors in run_ranks(tp_size, compare_layers, tp_size, is_published):
        assert len(errors) == count
        assert max(errors.values()) < 1e-12, errors


def compare_layers(tp_size: int, is_published: bool) -> dict[str, float]:
    """Error of the output and of each gradient on this rank, relative to the largest number."""
    mesh = mesh_module.start(tp_size, timeout_s=60, seed=3)
    assert not parallel_state.is_initialized(), "Megatron's layers get their group from the mesh"
    network = NetworkArgs(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=WIDTH,
        hidden_dropout=0.0,
        position_encoding=("relative_bias",),
        dtype_str="float32",
        norm_affine=not is_published,
        uvqk_bias=not is_published,
        output_bias=is_published,
    )
    features = SequenceFeatures("item", None, ("context",), max_items=MAX_ITEMS + 2)
    encoder = SequenceEncoder(network, features).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(BATCH.layout().num_tokens, HIDDEN, dtype=torch.float64)
    slope = torch.randn_like(x)
    split_encoder(encoder, mesh)
    (layer,) = encoder.layers
    assert isinstance(layer, FusedHSTULayer)
    theirs = MegatronHSTULayer(network, features.max_tokens(network), mesh).double()
    theirs.load_state_dict(layer.state_dict())

    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = torch.add(*layer(x_ours, BATCH.layout())), torch.add(*theirs(x_theirs, BATCH.layout()))
    out.backward(slope)
    expected.backward(slope)
    ours, exact = ({"x": x, **dict(module.named_parameters())} for x, module in ((x_ours, layer), (x_theirs, theirs)))
    assert ours.keys() == exact.keys()
    mesh_module.finish()
    pairs = {name: (ours[name].grad, leaf.grad) for name, leaf in exact.items()} | {"output": (out, expected)}
    return {
        name: float((a - b).abs().max() / b.abs().max())
        for name, (a, b) in pairs.items()
        if a is not None and b is not None
    }


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
