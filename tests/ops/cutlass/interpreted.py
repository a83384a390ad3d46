"""Runs a compiled kernel's PTX on the interpreter, with the arguments that its host function would pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hstu.ops.attention import AttentionRule
from hstu.ops.cutlass.schedule import ITEM_FIELDS, Rows, leading_rows, make_schedule
from hstu.ops.layout import JaggedLayout
from tests.ops.cutlass.ptx_machine import Cta, TensorMap
from tests.ops.cutlass.ptx_parse import parse

FIRST_ADDRESS = 2**32
NUM_CTAS = 2  # so that each takes several turns


def run_kernel(
    ptx: str,
    stationary: list[Tensor],
    streamed: list[Tensor],
    num_outs: int,
    layout: JaggedLayout,
    rule: AttentionRule,
    rows: Rows,
    block: int,
    tile: int,
    num_threads: int,
) -> list[Tensor]:
    """The outputs of an attention kernel. stationary and streamed: x, w and y, z of the kernels, [T, H, d]."""
    program = parse(ptx)
    hopper = any(size == 128 for _, size in program.params)  # its inputs come as TMA descriptors
    schedule = make_schedule(layout, rule, rows, block, tile)
    tokens, heads, width = stationary[0].shape
    memory: dict[int, np.ndarray] = {}

    def place(array: np.ndarray) -> int:
        address = FIRST_ADDRESS * (1 + len(memory))
        memory[address] = array.reshape(-1).view(np.uint8)
        return address

    def loaded(tensor: Tensor, num_rows: int) -> TensorMap:
        return TensorMap(tensor.contiguous().view(torch.int16).numpy().view(np.uint16), num_rows, min(width, 64))

    # x, y, z or x, y, w, z.
    pairs = [loaded(stationary[0], block), loaded(streamed[0], tile)]
    pairs += [loaded(tensor, block) for tensor in stationary[1:]] + [loaded(streamed[1], tile)]
    outs = [torch.full((tokens, heads, width), float("nan"), dtype=stationary[0].dtype) for _ in range(num_outs)]
    inputs = [] if hopper else [stationary[0], streamed[0], *stationary[1:], streamed[1]]
    arrays = [tensor.contiguous().view(torch.int16).numpy() for tensor in (*inputs, *outs)]
    tensors = [
        np.array([place(array), tokens | heads << 32, heads * width, width], np.uint64).tobytes() for array in arrays
    ]
    items, tiles = (np.array([place(array)], np.uint64).tobytes() for array in (schedule.items, schedule.tiles))
    group = max(layout.candidate_group_tokens, 1)
    sizes = [tokens, heads, len(schedule.items), leading_rows(layout, rule), group]
    numbers = [np.array([number], np.int32).tobytes() for number in sizes]
    numbers += [np.array([number], np.float32).tobytes() for number in (rule.alpha, 1 / rule.scaling_seqlen)]
    numbers_then = iter([items, tiles, *numbers])
    maps, structs = iter(pairs), iter(tensors)
    params: dict[str, object] = {}
    coordinates = False
    for name, size in program.params:
        if coordinates:  # the shape of a tensor that TMA loads: nobody reads it
            params[name], coordinates = b"", False
        elif size == 128:
            params[name], coordinates = next(maps), True
        else:
            params[name] = next(structs) if size == 32 else next(numbers_then)
    assert schedule.items.shape[1] == ITEM_FIELDS and next(numbers_then, None) is None
    for index in range(NUM_CTAS):
        Cta(program, params, memory, index, NUM_CTAS, num_threads).run()
    return outs
