"""Interprets the PTX of a kernel with the arguments that its host function passes."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.ops.cutlass.attention import Variant, bias_tensors, compile_ahead
from hstu.ops.cutlass.bias import BiasArguments, BiasSums
from hstu.ops.cutlass.schedule import leading_rows, list_blocks
from hstu.ops.kernels import AttentionConfig
from hstu.ops.layout import JaggedLayout
from tests.ops.cutlass.ptx.machine import Cta, TensorMap
from tests.ops.cutlass.ptx.registers import parse

FIRST_ADDRESS = 2**32
NUM_CTAS = 2  # so few that each computes several blocks


@functools.cache
def ptx_of(variant: Variant) -> str:
    """The PTX of a kernel."""
    return compile_ahead(variant)[0]


def run_kernel(
    variant: Variant,
    ptx: str,
    inputs: list[Tensor],
    before_silu: Sequence[Tensor],
    layout: JaggedLayout,
    config: AttentionConfig,
    bias: BiasArguments | None = None,
    sums: BiasSums | None = None,
) -> list[Tensor]:
    """The outputs of a kernel for its inputs x, y, z or x, y, w, z: [T, H, d]. Adds to ``sums``.

    With ``before_silu``, of which the rows of each output are the SiLU, the sums [H, d] of each output follow.
    """
    program = parse(ptx)
    hopper = any(size == 128 for _, size in program.params)  # its inputs come as TMA descriptors
    shape = variant.shape
    blocks = list_blocks(layout, config, shape.rows, shape.block)
    tokens, heads, width = inputs[0].shape
    memory: dict[int, np.ndarray] = {}

    def address_of(array: np.ndarray) -> int:
        address = FIRST_ADDRESS * (1 + len(memory))
        memory[address] = array.reshape(-1).view(np.uint8)
        return address

    def loaded(tensor: Tensor, num_rows: int) -> TensorMap:
        return TensorMap(tensor.contiguous().view(torch.int16).numpy().view(np.uint16), num_rows, min(width, 64))

    box_rows = [shape.block] * (variant.num_inputs - 2) + [shape.tile] * 2
    # As in a layer, the outputs are views of a larger tensor.
    between = (tokens, heads, 3, width)
    outs = [torch.full(between, float("nan"), dtype=variant.dtype)[:, :, 1] for _ in range(variant.num_outputs)]
    totals = [torch.full((variant.num_totals(len(blocks)), heads, width), float("nan")) for _ in before_silu]
    in_memory = [*([] if hopper else inputs), *outs, *before_silu, *totals]
    tensors = [
        np.array([address_of(_bytes_of(tensor)), tokens | heads << 32, *tensor.stride()[:2]], np.uint64).tobytes()
        for tensor in in_memory
    ]
    items = np.array([address_of(blocks)], np.uint64).tobytes()
    group = max(layout.candidate_group_tokens, 1)
    sizes = [tokens, heads, len(blocks), leading_rows(layout, config), group]
    numbers = [np.array([number], np.int32).tobytes() for number in sizes]
    numbers += [np.array([number], np.float32).tobytes() for number in (config.alpha, 1 / config.scaling_seqlen)]
    if bias is not None:
        tensors_of_bias = bias_tensors(variant, bias, sums)
        numbers += [np.array([address_of(tensor.numpy())], np.uint64).tobytes() for tensor in tensors_of_bias]
        numbers += [np.array([bias.center], np.int32).tobytes(), np.array([1 / config.alpha], np.float32).tobytes()]
    remaining = iter([items, *numbers])
    maps, structs = iter(map(loaded, inputs, box_rows)), iter(tensors)
    params: dict[str, Any] = {}
    coordinates = False
    for name, size in program.params:
        if coordinates:  # the shape of a tensor that TMA loads, which no kernel reads
            params[name], coordinates = b"", False
        elif size == 128:
            params[name], coordinates = next(maps), True
        else:
            params[name] = next(structs) if size == 32 else next(remaining)
    assert next(remaining, None) is None
    for index in range(NUM_CTAS):
        Cta(program, params, memory, index, NUM_CTAS, 384 if hopper else 256).run()
    return [*outs, *(total.sum(0) for total in totals)]


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor, from its first to its last element."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).view(torch.uint8).numpy()
