"""Addresses are computed in 64 bits, because a product of a row and a stride may exceed 2³¹."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.backends import INTERPRETED
from tests.ops.oracle import User
from tests.ops.strategies import Batch

pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

import triton
from kernel_variants import record, source_of, variants
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from hstu.ops.comm import LayerComm
from hstu.ops.kernels import AttentionConfig, AttentionInputs, GateConfig, GateInputs, Gradient
from hstu.ops.triton import attention, linear, norm
from hstu.ops.triton.compile_ahead import WARP_SIZE, specialized_kernel
from hstu.ops.triton.launch import Launch

CAPABILITY = 90
PRODUCT_OF_32_BITS = re.compile(r"arith\.muli %(\w+), %(\w+) .*: (?:i32|tensor<[0-9x]+xi32>)")
STRIDE = 2**30 + 64
"""Twice this exceeds 2³¹."""


def distinct_launches() -> Iterator[Launch]:
    """One launch of each specialization of each kernel. Heads of all widths share their arithmetic: one is enough."""
    seen = set()
    for variant in variants():
        if variant.op != "hstu_attention" or variant.head_dim == 64:
            for launch in record(variant, CAPABILITY):
                name = specialized_kernel(launch, launch.configs[0], CAPABILITY)
                if name not in seen:
                    seen.add(name)
                    yield launch


def triton_ir(launch: Launch) -> str:
    """The kernel after inlining and simplification, before anything depends on the GPU."""
    target = GPUTarget("cuda", CAPABILITY, WARP_SIZE)
    backend, (source, options) = make_backend(target), source_of(launch, launch.configs[0], CAPABILITY)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    return str(stages["ttir"](module, {}))


def products_of_32_bits(text: str) -> list[str]:
    """The lines that multiply two numbers of 32 bits of which neither is a constant."""
    constants = set(re.findall(r"%(\w+) = arith\.constant", text))
    products = ((PRODUCT_OF_32_BITS.search(line), line.strip()) for line in text.splitlines())
    return [line for found, line in products if found and not constants & set(found.groups())]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_no_kernel_multiplies_two_run_time_numbers_in_32_bits() -> None:
    found, products = {}, 0
    for launch in distinct_launches():
        text = triton_ir(launch)
        products += len(re.findall(r"arith\.muli .*(?:i64|xi64>)", text))
        if lines := products_of_32_bits(text):
            found[launch.kernel.fn.__name__] = lines
    assert products > 100, "the search does not fit the language of this version of Triton"
    assert not found, f"Triton {triton.__version__}: cast one factor to tl.int64 first: {found}"


def test_the_search_finds_a_product_of_two_arguments_and_no_other() -> None:
    text = """
      %block = arith.constant 64 : i32
      %0 = arith.muli %row, %stride_1 : tensor<64x1xi32> loc(#loc1)
      %1 = arith.muli %program, %block : i32 loc(#loc2)
      %2 = arith.muli %row_2, %stride_3 : tensor<64x1xi64> loc(#loc3)
    """
    assert products_of_32_bits(text) == ["%0 = arith.muli %row, %stride_1 : tensor<64x1xi32> loc(#loc1)"]


@pytest.fixture
def memory(tmp_path: Path) -> Tensor:
    """More than 2³² numbers, of which only those that are written take space: a file with holes."""
    return torch.from_file(str(tmp_path / "holes"), shared=True, size=2**32 + 2**16, dtype=torch.float16)


def spread(memory: Tensor, tensors: list[Tensor], dim: int) -> list[Tensor]:
    """Equal tensors with ``STRIDE`` in a dimension of 3. An offset that wraps around is in ``memory``, too: a zero."""
    views = []
    for index, tensor in enumerate(tensors):
        strides = list(tensor.stride())
        strides[dim] = STRIDE
        views.append(memory.as_strided(tensor.shape, strides, 2**31 + 1024 * index).copy_(tensor))
    return views


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no memory with holes")
class TestStridesBeyond32Bits:
    """Interpreted kernels compute the same from tensors whose rows or heads lie 2³⁰ numbers apart."""

    @pytest.mark.parametrize("dim", [0, 1])
    def test_attention(self, memory: Tensor, dim: int) -> None:
        torch.manual_seed(0)
        layout, config = Batch((User(3, 0),), 0, 1, 1).layout(with_times=False), AttentionConfig(0.5, 1)
        inputs = [torch.randn(3, 3, 16, dtype=torch.float16) for _ in range(4)]
        results = []
        for grad, q, k, v, *grads in (
            [*inputs, *map(torch.empty_like, inputs[1:])],
            spread(memory, [*inputs, *map(torch.zeros_like, inputs[1:])], dim),
        ):
            given = AttentionInputs(q, k, v, layout, config)
            out = attention.forward(given)
            of_q, of_k, of_v = map(Gradient, grads)
            attention.backward(grad, given, (of_q, of_k, of_v))
            results.append([out, *grads])
        for near, far in zip(*results, strict=True):
            assert torch.equal(near, far) and near.abs().max() > 0.1

    def test_the_gate(self, memory: Tensor) -> None:
        torch.manual_seed(0)
        near = [torch.randn(3, 3, 16, dtype=torch.float16) for _ in range(2)]
        weight, bias, config = torch.rand(48), torch.rand(48), GateConfig(1e-5, 0.0, LayerComm())
        for dim in (0, 1):
            of_far, of_near = (
                norm.gate_forward(GateInputs(x, u, weight, bias, config))[0]
                for x, u in (spread(memory, near, dim), near)
            )
            assert torch.equal(of_far, of_near)

    def test_the_projection(self, memory: Tensor) -> None:
        torch.manual_seed(0)
        near = [torch.randn(3, 16, dtype=torch.float16) for _ in range(2)]
        bias = torch.zeros(3, dtype=torch.float16)
        results = [linear.project(x, weight, bias)[0] for x, weight in (near, spread(memory, near, 0))]
        assert torch.equal(*results)
