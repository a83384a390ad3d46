"""Runs a compiled kernel's PTX on the interpreter, with the arguments that its host function would pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hstu.ops.attention import AttentionRule
from hstu.ops.cutlass.kernels import Variant
from hstu.ops.cutlass.schedule import leading_rows, make_schedule
from hstu.ops.layout import JaggedLayout
from tests.ops.cutlass.ptx_machine import Cta, TensorMap
from tests.ops.cutlass.ptx_parse import parse

FIRST_ADDRESS = 2**32
NUM_CTAS = 2  # so that each takes several turns


def run_kernel(
    variant: Variant, ptx: str, inputs: list[Tensor], layout: JaggedLayout, rule: AttentionRule
) -> list[Tensor]:
    """The outputs of a kernel for its inputs x, y, z or x, y, w, z: [T, H, d]."""
    program = parse(ptx)
    hopper = any(size == 128 for _, size in program.params)  # its inputs come as TMA descriptors
    shape = variant.shape
    schedule = make_schedule(layout, rule, shape.rows, shape.block, shape.tile)
    tokens, heads, width = inputs[0].shape
    memory: dict[int, np.ndarray] = {}

    def place(array: np.ndarray) -> int:
        address = FIRST_ADDRESS * (1 + len(memory))
        memory[address] = array.reshape(-1).view(np.uint8)
        return address

    def loaded(tensor: Tensor, num_rows: int) -> TensorMap:
        return TensorMap(tensor.contiguous().view(torch.int16).numpy().view(np.uint16), num_rows, min(width, 64))

    at_once = [shape.block, shape.tile, shape.block, shape.tile]
    if variant.num_inputs == 3:
        at_once[2] = shape.tile
    # Gradients lie as a layer's do, with others between the heads.
    between = (tokens, heads, 3, width)
    outs = [torch.full(between, float("nan"), dtype=variant.dtype)[:, :, 1] for _ in range(variant.num_outputs)]
    in_memory = outs if hopper else [*inputs, *outs]
    tensors = [
        np.array([place(_bytes_of(tensor)), tokens | heads << 32, *tensor.stride()[:2]], np.uint64).tobytes()
        for tensor in in_memory
    ]
    items, tiles = (np.array([place(array)], np.uint64).tobytes() for array in (schedule.items, schedule.tiles))
    group = max(layout.candidate_group_tokens, 1)
    sizes = [tokens, heads, len(schedule.items), leading_rows(layout, rule), group]
    numbers = [np.array([number], np.int32).tobytes() for number in sizes]
    numbers += [np.array([number], np.float32).tobytes() for number in (rule.alpha, 1 / rule.scaling_seqlen)]
    numbers_then = iter([items, tiles, *numbers])
    maps, structs = iter(map(loaded, inputs, at_once)), iter(tensors)
    params: dict[str, object] = {}
    coordinates = False
    for name, size in program.params:
        if coordinates:  # the shape of a tensor that TMA loads: nobody reads it
            params[name], coordinates = b"", False
        elif size == 128:
            params[name], coordinates = next(maps), True
        else:
            params[name] = next(structs) if size == 32 else next(numbers_then)
    assert next(numbers_then, None) is None
    for index in range(NUM_CTAS):
        Cta(program, params, memory, index, NUM_CTAS, 384 if hopper else 256).run()
    return outs


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """What lies between the first and the last element of a tensor of 16-bit numbers, as it lies in memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).view(torch.int16).numpy()
