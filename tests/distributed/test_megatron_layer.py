"""The fused HSTU layer against a layer of Megatron-core's parallel linears and mappings with the same weight shards."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

from hstu.config.args import NetworkArgs
from hstu.model.inputs import SequenceFeatures
from hstu.model.stack import HSTULayer, SequenceEncoder
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import RelativeBias
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel import mesh as mesh_module
from hstu.parallel.tensor import split_encoder
from tests.distributed.launch import run_ranks
from tests.ops.oracle import User
from tests.ops.strategies import Batch

HIDDEN, HEADS, WIDTH, MAX_ITEMS = 12, 4, 3, 9
# 24 tokens: 4 ranks share them without padding
BATCH = Batch((User(9, 2, tuple(range(0, 1100, 100))), User(4, 0, (1, 1, 90, 10**9)), User(6, 0, (3,) * 6)), 1, 1, 1)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor_parallel", "sequence_parallel"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_outputs_and_gradients_equal_those_of_megatrons_layers(tp_size: int, sequence_parallel: bool) -> None:
    for errors in run_ranks(tp_size, compare_layers, tp_size, sequence_parallel):
        assert len(errors) == 11
        assert max(errors.values()) < 1e-12, errors


def compare_layers(tp_size: int, sequence_parallel: bool) -> dict[str, float]:
    """Error of the output and of each gradient on this rank, relative to the largest number."""
    mesh = mesh_module.start(tp_size, timeout_s=60, seed=3)
    network = NetworkArgs(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=WIDTH,
        hidden_dropout=0.0,
        position_encoding="relative_bias",
        sequence_parallel=sequence_parallel,
        dtype_str="float32",
    )
    encoder = SequenceEncoder(network, SequenceFeatures("item", None, ("context",), max_items=MAX_ITEMS + 2)).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(BATCH.layout().num_tokens, HIDDEN, dtype=torch.float64)
    slope = torch.randn_like(x)
    split_encoder(encoder, mesh)
    (layer,) = encoder.layers
    assert isinstance(layer, HSTULayer)
    theirs = MegatronLayer(layer, mesh, sequence_parallel and mesh.tp_size > 1)

    x_ours = x.clone().requires_grad_()
    out = layer.comm.join_tokens(torch.add(*layer(*layer.comm.split_tokens(x_ours, BATCH.layout()))), len(x))
    out.backward(slope)
    own = slice(None)
    if theirs.sequence_parallel:
        own = slice(mesh.tp_rank * len(x) // mesh.tp_size, (mesh.tp_rank + 1) * len(x) // mesh.tp_size)
    x_theirs = x[own].clone().requires_grad_()
    expected = theirs(x_theirs, BATCH.layout())
    expected.backward(slope[own])
    if theirs.sequence_parallel:  # as Megatron's finalize_model_grads does for the norms
        for parameter in theirs.input_norm.parameters():
            dist.all_reduce(parameter.grad, group=mesh.tp_group)

    assert x_ours.grad is not None
    pairs = {"output": (out[own], expected), "x": (x_ours.grad[own], x_theirs.grad)}
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    pairs |= {name: (parameter.grad, gradients[name]) for name, parameter in layer.named_parameters()}
    assert len(gradients) == len(pairs) - 2
    mesh_module.finish()
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


class MegatronLayer(nn.Module):
    """The HSTU layer from Megatron-core's parts, with the (sharded) weights of ``layer``; names as there.

    Megatron's mappings for sequence parallelism and its linears under it allocate on the current CUDA device. In their
    place :class:`_GatherTokens` and :class:`_ReduceScatterTokens` call torch's collectives.
    """

    def __init__(self, layer: HSTULayer, mesh: mesh_module.Mesh, sequence_parallel: bool) -> None:
        super().__init__()
        inner = HEADS * WIDTH
        config: Any = ModelParallelConfig(
            tensor_model_parallel_size=mesh.tp_size,
            use_cpu_initialization=True,
            params_dtype=torch.float64,
            gradient_accumulation_fusion=False,
        )
        shared: dict[str, Any] = {"config": config, "init_method": nn.init.zeros_, "tp_group": mesh.tp_group}
        self.sequence_parallel = sequence_parallel
        self.group, self.attention_config = mesh.tp_group, layer.attention_config
        self.input_norm = nn.LayerNorm(HIDDEN, eps=layer.input_norm.eps).double()
        # The gradient of gathered tokens is reduce-scattered, which includes the sum over the ranks.
        self.uvqk = ColumnParallelLinear(HIDDEN, 4 * inner, disable_grad_reduce=sequence_parallel, **shared)
        self.bias = nn.ParameterDict({"position_weight": torch.empty(0), "time_weight": torch.empty(0)})
        self.output_norm = nn.LayerNorm(inner // mesh.tp_size, eps=layer.output_norm.eps).double()
        self.out = RowParallelLinear(inner, HIDDEN, bias=False, input_is_parallel=True, skip_bias_add=False, **shared)
        for name, parameter in layer.named_parameters():
            module, _, attribute = name.partition(".")
            assert module == "bias" or self.get_parameter(name).shape == parameter.shape
            setattr(getattr(self, module), attribute, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        tokens = self.input_norm(x)
        if self.sequence_parallel:
            tokens = _GatherTokens.apply(tokens, self.group)
        projected, _ = self.uvqk(tokens)
        u, v, q, k = functional.silu(projected).view(len(tokens), -1, 4, WIDTH).unbind(2)
        # Each rank uses the bias on its heads alone, and copy_to_... sums the gradients.
        bias = RelativeBias(*(copy_to_tensor_model_parallel_region(weight) for weight in self.bias.values()))
        attended = hstu_attention(q, k, v, layout, self.attention_config, bias, REFERENCE_KERNELS.attention)
        gated = self._norm_over_all_heads(attended.flatten(1)) * u.flatten(1)
        if self.sequence_parallel:
            return x + _ReduceScatterTokens.apply(functional.linear(gated, self.out.weight), self.group)
        out, _ = self.out(gated)
        return x + out

    def _norm_over_all_heads(self, own: Tensor) -> Tensor:
        centred = own - self._mean_over_all_heads(own)
        rstd = torch.rsqrt(self._mean_over_all_heads(centred.square()) + self.output_norm.eps)
        return centred * rstd * self.output_norm.weight + self.output_norm.bias

    def _mean_over_all_heads(self, own: Tensor) -> Tensor:
        """Mean over the columns of all ranks [T, 1]; forward and backward are all-reduces."""
        total = reduce_from_tensor_model_parallel_region(own.sum(1, keepdim=True))
        return copy_to_tensor_model_parallel_region(total) / (HEADS * WIDTH)


class _GatherTokens(torch.autograd.Function):
    """Rows of all ranks from those of each; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(own, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    """Each rank's rows of the sum over the ranks; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(partial, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = own.new_empty(len(own) * group.size(), own.shape[1])
    dist.all_gather_into_tensor(rows, own.contiguous(), group)
    return rows


def _reduce_scatter(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = partial.new_empty(len(partial) // group.size(), partial.shape[1])
    dist.reduce_scatter_tensor(own, partial.contiguous(), group=group)
    return own
