"""One layer, on kernels of PyTorch and on fast ones, against its formula; recomputation changes no bit."""

import copy
import functools
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.model.layer import HSTULayer
from hstu.model.stack import FusedHSTULayer
from hstu.ops.kernels import Backend
from tests.model.examples import gradients, make_network
from tests.ops import oracle
from tests.ops.backends import INTERPRETED, kernels_of
from tests.ops.oracle import User
from tests.ops.strategies import Batch

BATCH = Batch(
    (
        User(4, 2, (0, 5, 5, 90, 4000, 10**6)),
        User(0, 0),
        User(6, 0, (1, 2, 4, 8, 16, 10**9)),
        User(0, 0, is_padding=True),
    ),
    contextuals=2,
    tokens_per_item=2,
    group_size=1,
)
MAX_TOKENS = 16
FAST = Backend.TRITON if INTERPRETED else Backend.CPU


def make_layer(backend: Backend = Backend.PYTORCH, **changes: Any) -> FusedHSTULayer:
    torch.manual_seed(0)
    layer = FusedHSTULayer(make_network(**changes), MAX_TOKENS, kernels_of(backend, has_bias=True))
    for parameter in layer.parameters():  # far from the initial values, so that each term counts
        nn.init.normal_(parameter, std=0.5)
    return layer


def formula(layer: FusedHSTULayer, x: Tensor) -> Tensor:
    """The layer written down from the model's definition, with plain float64 operators."""
    network, heads, width = layer.network, 2, 4
    weights = dict(layer.named_parameters())
    norms = {
        norm: (weights.pop(f"{norm}.weight"), weights.pop(f"{norm}.bias"))
        if network.norm_affine
        else (torch.ones(8, dtype=x.dtype), torch.zeros(8, dtype=x.dtype))
        for norm in ("input_norm", "output_norm")
    }
    y = F.layer_norm(x, (8,), *norms["input_norm"], network.norm_epsilon)
    projected = y @ weights.pop("uvqk.weight").T
    projected = F.silu(projected + weights.pop("uvqk.bias") if network.uvqk_bias else projected)
    per_head = [projected[:, head * 4 * width : (head + 1) * 4 * width] for head in range(heads)]
    u, v, q, k = (torch.stack([h[:, i * width : (i + 1) * width] for h in per_head], dim=1) for i in range(4))
    attended = oracle.attention(
        q,
        k,
        v,
        BATCH.tokens(),
        alpha=network.attention_scale or 1 / width**0.5,
        scaling_seqlen=network.scaling_seqlen if network.scaling_seqlen > 0 else MAX_TOKENS,
        is_causal=network.is_causal,
        contextual_mask=not network.disable_contextual_mask,
        bias=None if layer.bias is None else (weights.pop("bias.position_weight"), weights.pop("bias.time_weight")),
        max_span=network.attention_spans[0],
        full_tokens=network.min_full_attention_tokens,
    )
    gated = oracle.norm_mul([attended, u, *norms["output_norm"]], network.norm_epsilon)
    update = gated @ weights.pop("out.weight").T
    update = update + weights.pop("out.bias") if network.output_bias else update
    assert not weights, "a layer has the weights of its formula and no others"
    return x + update


CHANGES: list[dict[str, Any]] = [
    {},
    {"is_causal": False},
    {"disable_contextual_mask": True},
    {"position_encoding": "relative_bias"},
    {"position_encoding": ("absolute", "relative_bias")},
    {"attention_scale": 1.5},
    {"scaling_seqlen": 5},
    {"norm_epsilon": 0.1},
    {"max_attention_span": 3},
    {"max_attention_span": (2, None), "min_full_attention_tokens": 4, "position_encoding": "relative_bias"},
]


LAYOUTS: list[dict[str, Any]] = [
    {"norm_affine": norm_affine, "uvqk_bias": uvqk_bias, "output_bias": output_bias}
    for norm_affine, uvqk_bias, output_bias in product([True, False], repeat=3)
]
"""Which weights a layer has."""
ON_FAST_KERNELS: list[dict[str, Any]] = [
    {},
    {"is_causal": False},
    {"position_encoding": "relative_bias"},
    {"position_encoding": "relative_bias", "max_attention_span": 4, "min_full_attention_tokens": 3},
]


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        *((Backend.PYTORCH, changes) for changes in CHANGES + LAYOUTS),
        *((FAST, changes) for changes in ON_FAST_KERNELS + LAYOUTS),
    ],
    ids=str,
)
def test_equals_its_formula_forward_and_backward(backend: Backend, changes: dict[str, Any]) -> None:
    dtype, tolerance = (torch.float64, 1e-11) if backend is Backend.PYTORCH else (torch.float32, 1e-5)
    layer = make_layer(backend, **changes).to(dtype)
    reference = copy.deepcopy(layer).double()
    layout = BATCH.layout()
    x = torch.randn(layout.num_tokens, 8, dtype=dtype)
    weight = torch.randn_like(x)
    out, expected = torch.add(*layer(x, layout)), formula(reference, x.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, exact in gradients(reference).items():
        allowed = tolerance * float(exact.abs().max())
        torch.testing.assert_close(gradients(layer)[name].double(), exact, rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize("changes", [*CHANGES, *LAYOUTS, {"hidden_dropout": 0.3}], ids=str)
def test_the_plain_layer_equals_the_fused_one(changes: dict[str, Any]) -> None:
    fused = make_layer(**changes).double()
    plain = HSTULayer(fused.network, MAX_TOKENS).double()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(BATCH.layout().num_tokens, 8, dtype=torch.float64)
    for ours, expected in zip(step(fused, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def step(layer: HSTULayer, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and all gradients of a training step with a fixed dropout seed."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = torch.add(*layer(x, BATCH.layout()))
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(gradient.clone() for gradient in gradients(layer).values())]


RECOMPUTE = [
    {"recompute_input_layernorm": True},
    {"recompute_input_silu": True},
    {"recompute_input_layernorm": True, "recompute_input_silu": True},
    {"recompute_layer": True},
    {"recompute_layer": True, "recompute_input_layernorm": True, "recompute_input_silu": True},
]


WITH_DROPOUT: dict[str, Any] = {
    "hidden_dropout": 0.3,
    "position_encoding": "relative_bias",
    "max_attention_span": 5,
    "output_bias": True,
}


@functools.cache
def kept(backend: Backend, dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """An input, and a step on it in which all is kept; of each once, for it takes an interpreter a second or two."""
    torch.manual_seed(1)
    x = torch.randn(BATCH.layout().num_tokens, 8)
    plain = step(make_layer(backend, **WITH_DROPOUT), x, dtype)
    assert not torch.equal(plain[0], step(make_layer(backend, **WITH_DROPOUT | {"hidden_dropout": 0.0}), x, dtype)[0])
    return x, plain


@pytest.mark.parametrize("backend", [Backend.PYTORCH, FAST])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("changes", RECOMPUTE, ids=str)
def test_recomputing_gives_the_same_bits_with_dropout(
    backend: Backend, changes: dict[str, bool], dtype: torch.dtype | None
) -> None:
    x, expected = kept(backend, dtype)
    for a, b in zip(expected, step(make_layer(backend, **WITH_DROPOUT, **changes), x, dtype), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_stays_close_to_float32() -> None:
    torch.manual_seed(1)
    x = torch.randn(BATCH.layout().num_tokens, 8)
    exact, rounded = step(make_layer(), x), step(make_layer(), x, torch.bfloat16)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32  # residual stream and gradients
        torch.testing.assert_close(b, a, rtol=0, atol=0.03 * max(1.0, float(a.abs().max())))
