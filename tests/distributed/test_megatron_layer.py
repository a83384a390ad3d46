"""The fused HSTU layer against the one of Megatron-core's parallel linears with the same weight shards."""

import pytest
import torch
from megatron.core import parallel_state
from torch import nn

from hstu.config.args import NetworkArgs
from hstu.model.inputs import SequenceFeatures
from hstu.model.stack import FusedHSTULayer, SequenceEncoder
from hstu.parallel import mesh as mesh_module
from hstu.parallel.layer_comm import split_encoder
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_layer import MegatronHSTULayer
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
