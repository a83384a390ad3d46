"""The layer as one function: its gradients, its heads on several ranks, and to the byte what it keeps for backward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.config.args import NetworkArgs
from hstu.model.stack import FusedHSTULayer
from hstu.ops.comm import LayerComm
from hstu.ops.kernels import AttentionConfig, Backend
from hstu.ops.layer import HSTULayerConfig, HSTULayerFunction
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch import operators
from tests.model.examples import make_network
from tests.ops.backends import INTERPRETED, kernels_of
from tests.ops.oracle import User
from tests.ops.rank_threads import RankThread, on_ranks
from tests.ops.strategies import Batch

BACKENDS = [Backend.TRITON] if INTERPRETED else [Backend.PYTORCH, Backend.CPU]
HIDDEN, HEADS, WIDTH, LONGEST = 6, 4, 3, 16
USERS = (User(4, 2, (0, 5, 5, 90, 4000, 10**6)), User(0, 0), User(7, 0, (1, 2, 4, 8, 16, 10**5, 10**9)))
TIMED = Batch(USERS, contextuals=2, tokens_per_item=1, group_size=1)
RECOMPUTE = [
    {},
    {"recompute_input_layernorm": True},
    {"recompute_input_silu": True},
    {"recompute_input_layernorm": True, "recompute_input_silu": True},
    {"recompute_layer": True},
]


def make_weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """In the order of LayerWeights."""
    torch.manual_seed(0)
    inner = HEADS * WIDTH
    shapes = [(HIDDEN,)] * 2 + [(4 * inner, HIDDEN), (4 * inner,), (2 * LONGEST - 1,), (NUM_TIME_BUCKETS,)]
    shapes += [(inner,), (inner,), (HIDDEN, inner), (HIDDEN,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def make_config(backend: Backend = Backend.PYTORCH, comm: LayerComm | None = None, **options: Any) -> HSTULayerConfig:
    kernels = kernels_of(backend, WIDTH, has_bias=True)
    return HSTULayerConfig(WIDTH, AttentionConfig(0.6, LONGEST), 0.1, kernels, comm=comm or LayerComm(), **options)


def padded_layout() -> JaggedLayout:
    """A multiple of 4 tokens, so that 4 ranks can share them."""
    batch = Batch((*USERS, User(3, 0, (3, 4, 9))), contextuals=2, tokens_per_item=1, group_size=1)
    assert batch.layout().num_tokens == 24
    return batch.layout()


@pytest.mark.skipif(INTERPRETED, reason="float64")
@pytest.mark.parametrize("options", [{}, {"recompute_all": True}], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    layout, config = TIMED.layout(), make_config(**options)
    x, update = (torch.randn(layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x: Tensor, update: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return HSTULayerFunction.apply(x, update, layout, config, *weights)

    assert torch.autograd.gradcheck(function, (x, update, *make_weights()), fast_mode=True)


@pytest.mark.skipif(INTERPRETED, reason="float64")
@pytest.mark.parametrize("operators", [("attention",), ("norm_mul_dropout",), ("attention", "norm_mul_dropout")])
def test_a_layer_differentiates_silu_where_a_kernel_does_not(operators: tuple[str, ...]) -> None:
    layout, config = TIMED.layout(), make_config()
    unfused = {name: replace(getattr(config.kernels, name), differentiates_silu=False) for name in operators}
    torch.manual_seed(1)
    x = torch.randn(layout.num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights, slope = make_weights(), torch.randn_like(x)

    def gradients(config: HSTULayerConfig) -> tuple[Tensor, ...]:
        out = torch.add(*HSTULayerFunction.apply(x, None, layout, config, *weights))
        return torch.autograd.grad(out, [x, *weights], slope)

    other = replace(config, kernels=replace(config.kernels, **unfused))
    for ours, theirs in zip(gradients(config), gradients(other), strict=True):
        torch.testing.assert_close(ours, theirs)


CUT = (None, None, 0, 0, None, None, 0, 0, 1, None)
"""The dimension along which each weight is cut among tensor-parallel ranks."""


@pytest.mark.parametrize("options", [{}, {"recompute_normalized": True, "recompute_activated": True}], ids=str)
@pytest.mark.parametrize("parallel", ["tensor", "sequence", "context"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_ranks_give_what_one_rank_gives(
    backend: Backend, count: int, parallel: str, options: dict[str, bool]
) -> None:
    dtype = torch.float64 if backend is Backend.PYTORCH else torch.float32
    tolerance = 1e-10 if backend is Backend.PYTORCH else 2e-5
    layout, whole = padded_layout(), make_weights(dtype)
    x, update = (torch.randn(layout.num_tokens, HIDDEN, dtype=dtype, requires_grad=True) for _ in range(2))
    slope = torch.randn_like(x)

    def run(comm: LayerComm, rows: list[Tensor], slope: Tensor, weights: list[Tensor]) -> list[Tensor]:
        out = HSTULayerFunction.apply(*rows, layout, make_config(backend, comm, **options), *weights)
        return [*out, *torch.autograd.grad(torch.add(*out), [*rows, *weights], slope)]

    def one(comm: RankThread) -> list[Tensor]:
        parts = [w if dim is None else w.chunk(comm.tp_size, dim)[comm.rank] for w, dim in zip(whole, cut, strict=True)]
        weights = [part.detach().clone().requires_grad_() for part in parts]
        own = [tensor.chunk(count)[comm.rank] if rows == 0 else tensor for tensor in (x, update, slope)]
        return run(comm, [tensor.detach().clone().requires_grad_() for tensor in own[:2]], own[2], weights)

    rows = None if parallel == "tensor" else 0
    cut = (None,) * len(CUT) if parallel == "context" else CUT
    expected = run(LayerComm(), [x, update], slope, whole)
    by_output = zip(*on_ranks(one, count, parallel), strict=True)
    for index, (parts, exact) in enumerate(zip(by_output, expected, strict=True)):
        dim = rows if index < 4 else cut[index - 4]
        together = [torch.cat(parts, dim)] if dim is not None else list(parts)
        if parallel == "context" and index >= 4:  # each rank has the gradient by its own tokens
            together = [torch.stack(together).sum(0)]
        for ours in together:
            size = float(exact.detach().abs().max())
            torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance * size)


def network_of(dropout: float, **changes: Any) -> NetworkArgs:
    return make_network(hidden_size=32, kv_channels=16, hidden_dropout=dropout, **changes)


def saved(layer: FusedHSTULayer, inputs: tuple[Any, ...], dtype: torch.dtype | None) -> int:
    """Bytes of the storages that autograd is given to keep, apart from parameters'."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        layer(*inputs)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


def stays(layer: FusedHSTULayer, inputs: tuple[Any, ...], dtype: torch.dtype | None) -> int:
    """Bytes that are alive after the forward and were not before, by the allocator's own count, but for the update."""
    with (
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        _, update = layer(*inputs)
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()) - update.nbytes


def saved_bytes(network: NetworkArgs, tokens: int, element_size: int) -> int:
    """Bytes that one layer saves for backward: its float32 input and the fields of SavedActivations.

    element_size: bytes of a number in the compute type.
    """
    width, inner = network.hidden_size, network.num_attention_heads * network.kv_channels
    saved_input = 4 * tokens * width
    if network.recompute_layer:
        return saved_input
    statistics = 2 * 2 * 4 * tokens  # mean and rstd of both norms
    normalized = 0 if network.recompute_input_layernorm else tokens * element_size * width
    projected = tokens * element_size * 4 * inner
    activated = 0 if network.recompute_input_silu else projected
    attended = tokens * element_size * inner
    dropout_mask = tokens * inner if network.hidden_dropout > 0 else 0
    return saved_input + statistics + normalized + projected + activated + attended + dropout_mask


@pytest.mark.parametrize("which", ["later"] if INTERPRETED else ["first", "later"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("changes", RECOMPUTE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_is_the_formula_to_the_byte(
    backend: Backend, changes: dict[str, bool], dropout: float, dtype: torch.dtype | None, which: str
) -> None:
    """The first layer keeps its input, a later one the sum of its input and the update, which it allocates."""
    network = network_of(dropout, **changes)
    layer = FusedHSTULayer(network, 256, kernels_of(backend, dtype=dtype or torch.float32))
    layout = Batch((User(20, 0), User(18, 0)), 0, 1, 1).layout()
    tokens = layout.num_tokens
    x = torch.randn(tokens, 32, requires_grad=True)
    update = torch.randn(tokens, 32, dtype=dtype, requires_grad=True)
    inputs = (x, layout) if which == "first" else (x, layout, update)
    element = 4 if dtype is None else 2
    formula = saved_bytes(network, tokens, element)
    if backend is Backend.TRITON and dropout and not network.recompute_layer:
        formula += 8 - tokens * 32  # a seed, not a byte an element
    assert saved(layer, inputs, dtype) == formula
    if backend is Backend.TRITON:
        return  # an interpreter keeps what it likes
    generator = torch.get_rng_state().nbytes if network.recompute_layer and dropout else 0
    assert stays(layer, inputs, dtype) == formula - (x.nbytes if which == "first" else 0) + generator


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_nothing_is_kept(backend: Backend) -> None:
    layer, layout = FusedHSTULayer(network_of(0.2), 256, kernels_of(backend)), Batch((User(20, 0),), 0, 1, 1).layout()
    x = torch.randn(layout.num_tokens, 32)
    layer(x, layout)  # makes the attention's plan, which stays in the layout
    with torch.no_grad():
        assert saved(layer, (x, layout), None) == 0
        if backend is not Backend.TRITON:
            assert stays(layer, (x, layout), None) == 0


def test_backward_runs_twice_where_the_graph_is_retained_and_lets_go_where_it_is_not() -> None:
    layer, layout = FusedHSTULayer(network_of(0.2), 256), Batch((User(20, 0), User(9, 0)), 0, 1, 1).layout()
    x = torch.randn(layout.num_tokens, 32, requires_grad=True)
    out = torch.add(*layer(x, layout))
    first, again = (torch.autograd.grad(out.sum(), [x, *layer.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_adds_the_update_of_the_layer_before_with_the_bits_of_a_plain_sum(
    backend: Backend, residual: torch.dtype
) -> None:
    dtype, layout = torch.bfloat16, Batch((User(20, 0), User(9, 0)), 0, 1, 1).layout()
    layer = FusedHSTULayer(network_of(0.0), 256, kernels_of(backend, dtype=dtype))
    x = torch.randn(layout.num_tokens, 32).to(residual).requires_grad_()
    update = torch.randn(layout.num_tokens, 32, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        fused, plain = layer(x, layout, update), layer(x + update, layout)
    results = [[*out, *torch.autograd.grad(torch.add(*out).sin().sum(), [x, update])] for out in (fused, plain)]
    assert [tensor.dtype for tensor in results[0]] == [residual, dtype, residual, dtype]
    for ours, exact in zip(*results, strict=True):
        if INTERPRETED:  # it rounds bfloat16 towards zero, in each kernel anew
            torch.testing.assert_close(ours, exact, rtol=0, atol=0.06 * float(exact.detach().abs().max()))
        else:
            assert torch.equal(ours, exact)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_products_are_summed_in_float32_and_rounded_once(
    has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "cpu_multiplies_bfloat16", lambda: has_instructions)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).bfloat16() for size in ((70, 300), (40, 300), (40,)))
    exact = x.double() @ weight.double().t()
    for found, expected in (
        (operators.matmul(x, weight.t()), exact),
        (operators.linear(x, weight, bias), exact + bias.double()),
    ):
        assert found.dtype == torch.bfloat16
        # Half a unit in the last of 8 binary digits, and what float32 sums add to it.
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)
