"""A launch passes on the values that the DSL would pass on, without its Python."""

import ctypes
import time
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass")

from hstu.ops.cutlass import attention
from hstu.ops.cutlass.attention import NUM_FACTORS, NUM_SIZES, Kernel, Variant, launch_arguments
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS
from hstu.ops.self_check import small_layout

VARIANT = Variant(Kernel.KEYS, torch.bfloat16, 64, 80, through_silu=True)
WITH_BIAS = Variant(Kernel.QUERIES, torch.bfloat16, 128, 80, has_bias=True, through_silu=True)


@pytest.fixture(scope="module")
def function() -> Any:
    return attention._compile(VARIANT)


def check_arguments(function: Any, variant: Variant, of_bias: list[float], narrow_of_bias: list[int]) -> None:
    """Compare the memory of ours with that of the DSL."""
    expected, _kept_alive = function.generate_execution_args(*attention._examples(variant))
    tensors = len(variant.elements)
    arguments = launch_arguments(variant)
    arguments.write(*[16] * tensors, *[8] * 2 * tensors, 16, *[1] * NUM_SIZES, *[1.0] * NUM_FACTORS, *of_bias, 1, 0)
    ours, _ = function.generate_execution_args(*arguments.values)
    assert len(ours) == len(expected)
    is_narrow = [0] * (3 * tensors + 1) + [1] * (NUM_SIZES + NUM_FACTORS) + narrow_of_bias + [1, 0]
    for given, wanted, narrow in zip(ours, expected, is_narrow, strict=True):
        assert ctypes.string_at(given, 4 if narrow else 8) == ctypes.string_at(wanted, 4 if narrow else 8)


def test_a_launch_passes_on_what_the_dsl_makes_of_the_arguments(function: Any) -> None:
    check_arguments(function, VARIANT, [], [])


def test_a_launch_with_a_bias_passes_on_what_the_dsl_makes_of_the_arguments() -> None:
    check_arguments(attention._compile(WITH_BIAS), WITH_BIAS, [16] * 9 + [1, 1.0], [0] * 9 + [1, 1])


def test_the_arguments_of_a_launch_take_microseconds(function: Any) -> None:
    arguments, tensors = launch_arguments(VARIANT), len(VARIANT.elements)
    values = [16] * (3 * tensors + 1) + [1] * NUM_SIZES + [1.0] * NUM_FACTORS + [1, 0]
    fastest = float("inf")
    for _ in range(200):
        begun = time.perf_counter()
        arguments.write(*values)
        function.generate_execution_args(*arguments.values)
        fastest = min(fastest, time.perf_counter() - begun)
    assert fastest < 50e-6


def test_without_any_token_the_gradients_of_a_bias_are_zeros() -> None:
    layout = small_layout(torch.device("cpu"), (0, 0), (0, 0), num_contextuals=0)
    empty = torch.empty(layout.num_tokens, 2, 64, dtype=torch.bfloat16)
    bias, config = RelativeBias(torch.ones(2 * 9 - 1), torch.ones(NUM_TIME_BUCKETS)), AttentionConfig(1.0, 1)
    inputs = AttentionInputs(empty, empty, empty, layout, config, bias)
    grads = attention.backward(empty, inputs, (Gradient(empty), Gradient(empty), Gradient(empty)))
    assert grads is not None
    assert not grads.position_weight.any() and not grads.time_weight.any()
    assert grads.position_weight.shape == bias.position_weight.shape
