"""A layer on fast kernels: its formula, and the same bits with whatever is recomputed."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from hstu.model.stack import FusedHSTULayer
from hstu.ops.kernels import Backend
from tests.model.examples import gradients, make_network
from tests.model.test_layer import BATCH, MAX_TOKENS, RECOMPUTE, formula, step
from tests.ops.backends import INTERPRETED, kernels_of, require_compiler

WITH_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.3, "position_encoding": "relative_bias"}
BACKENDS = [Backend.TRITON if INTERPRETED else Backend.CPU]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if not INTERPRETED:
        require_compiler()


def make_layer(backend: Backend, **changes: Any) -> FusedHSTULayer:
    torch.manual_seed(0)
    layer = FusedHSTULayer(make_network(**changes), MAX_TOKENS, kernels_of(backend, has_bias=True))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": False},
        {"position_encoding": "relative_bias"},
        {"position_encoding": "relative_bias", "max_attention_span": 4, "min_full_attention_tokens": 3},
    ],
    ids=str,
)
def test_equals_its_formula_forward_and_backward(backend: Backend, changes: dict[str, Any]) -> None:
    layer = make_layer(backend, **changes)
    reference = copy.deepcopy(layer).double()
    x = torch.randn(BATCH.layout().num_tokens, 8)
    out, expected = torch.add(*layer(x, BATCH.layout())), formula(reference, x.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for name, exact in gradients(reference).items():
        scale = float(exact.abs().max())
        torch.testing.assert_close(gradients(layer)[name].double(), exact, rtol=0, atol=1e-5 * scale, msg=name)


@functools.cache
def plain(backend: Backend, dtype: torch.dtype | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An input, and a step on it in which all is kept; of each once, for it takes an interpreter a second or two."""
    torch.manual_seed(1)
    x = torch.randn(BATCH.layout().num_tokens, 8)
    return x, list(step(make_layer(backend, **WITH_DROPOUT), x, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("changes", RECOMPUTE, ids=str)
def test_recomputing_gives_the_same_bits_with_dropout(
    backend: Backend, changes: dict[str, bool], dtype: torch.dtype | None
) -> None:
    x, expected = plain(backend, dtype)
    for a, b in zip(expected, step(make_layer(backend, **WITH_DROPOUT, **changes), x, dtype), strict=True):
        assert torch.equal(a, b)
