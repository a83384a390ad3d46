"""The fused HSTU layer against the one of Megatron-core's parallel linears with the same weight shards."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hstu.config.args import NetworkArgs
from hstu.model.inputs import SequenceFeatures
from hstu.model.stack import FusedHSTULayer, SequenceEncoder
from hstu.parallel import mesh as mesh_module
from hstu.parallel.tensor import MegatronHSTULayer, split_encoder
from tests.distributed.launch import run_ranks
from tests.ops.oracle import User
from tests.ops.strategies import Batch

HIDDEN, HEADS, WIDTH, MAX_ITEMS = 12, 12, 3, 9
# 24 tokens: 3 or 4 ranks share them without padding
BATCH = Batch((User(9, 2, tuple(range(0, 1100, 100))), User(4, 0, (1, 1, 90, 10**9)), User(6, 0, (3,) * 6)), 1, 1, 1)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor_parallel", "sequence_parallel"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
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
    by_tokens = sequence_parallel and mesh.tp_size > 1
    if by_tokens:
        split_tokens(theirs, mesh.tp_group)

    x_ours = x.clone().requires_grad_()
    out = layer.comm.join_tokens(torch.add(*layer(*layer.comm.split_tokens(x_ours, BATCH.layout()))), len(x))
    out.backward(slope)
    own = slice(None)
    if by_tokens:
        own = slice(mesh.tp_rank * len(x) // mesh.tp_size, (mesh.tp_rank + 1) * len(x) // mesh.tp_size)
    x_theirs = x[own].clone().requires_grad_()
    expected = torch.add(*theirs(x_theirs, BATCH.layout()))
    expected.backward(slope[own])
    if by_tokens:  # as Megatron's finalize_model_grads does for the norms
        for parameter in theirs.input_norm.parameters():
            dist.all_reduce(parameter.grad, group=mesh.tp_group)

    assert x_ours.grad is not None
    pairs = {"output": (out[own], expected), "x": (x_ours.grad[own], x_theirs.grad)}
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    pairs |= {name: (parameter.grad, gradients[name]) for name, parameter in layer.named_parameters()}
    assert len(gradients) == len(pairs) - 2
    mesh_module.finish()
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def split_tokens(layer: MegatronHSTULayer, group: dist.ProcessGroup) -> None:
    """Sequence parallelism by torch's collectives: Megatron's allocate on the current CUDA device."""

    def project(tokens: Tensor) -> tuple[Tensor, None]:
        return functional.linear(_GatherTokens.apply(tokens, group), layer.uvqk.weight, layer.uvqk.bias), None

    def project_back(gated: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatterTokens.apply(functional.linear(gated, layer.out.weight), group), None

    layer.uvqk.forward, layer.out.forward = project, project_back  # type: ignore[method-assign]


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
