"""The fused HSTU layer, split over tensor-parallel ranks, against the whole plain layer."""

import pytest
import torch
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.model.inputs import SequenceFeatures
from hstu.model.layer import HSTULayer
from hstu.model.stack import SequenceEncoder
from hstu.parallel import mesh as mesh_module
from hstu.parallel.layer_comm import SPLIT_DIMS, split_encoder
from tests.distributed.launch import run_ranks
from tests.ops.oracle import User
from tests.ops.strategies import Batch

HIDDEN, HEADS, WIDTH, MAX_ITEMS = 12, 12, 3, 9
BATCH = Batch((User(9, 2, tuple(range(0, 1100, 100))), User(4, 0, (1, 1, 90, 10**9)), User(6, 0, (3,) * 6)), 1, 1, 1)


@pytest.mark.parametrize(("tp_size", "is_published", "count"), [(2, True, 7), (2, False, 11), (3, False, 11)])
def test_outputs_and_gradients_equal_those_of_the_whole_layer(tp_size: int, is_published: bool, count: int) -> None:
    for errors in run_ranks(tp_size, compare_layers, tp_size, is_published):
        assert len(errors) == count
        assert max(errors.values()) < 1e-12, errors


def compare_layers(tp_size: int, is_published: bool) -> dict[str, float]:
    """Error of the output and of each gradient on this rank, relative to the largest number."""
    mesh = mesh_module.start(tp_size, timeout_s=60, seed=3)
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
    whole, (layer,) = HSTULayer(network, features.max_tokens(network)).double(), encoder.layers
    whole.load_state_dict(layer.state_dict())
    split_encoder(encoder, mesh)
    results: list[dict[str, Tensor]] = []
    for module in (layer, whole):
        leaves = {"x": x.clone().requires_grad_(), **dict(module.named_parameters())}
        out = torch.add(*module(leaves["x"], BATCH.layout()))
        grads = torch.autograd.grad(out, [*leaves.values()], slope)
        results.append({"output": out, **dict(zip(leaves, grads, strict=True))})
    mesh_module.finish()
    ours, exact = results
    for name, dim in SPLIT_DIMS.items():
        if name in exact:
            exact[name] = exact[name].chunk(tp_size, dim)[mesh.tp_rank]
    assert ours.keys() == exact.keys()
    return {name: float((ours[name] - right).abs().max() / right.abs().max()) for name, right in exact.items()}
