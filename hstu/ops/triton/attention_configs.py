"""Tile sizes of the attention kernels, by head dim. The first of a list is what runs where nothing may be measured.

None spills registers up to head dim 128 (tests/ops/triton/test_compile_ahead.py).
"""

from __future__ import annotations

from triton import Config

Tiles = tuple[tuple[int, int, int, int], ...]
"""(BLOCK_M, BLOCK_N, num_warps, num_stages) to choose from."""

# By the widest tile (BLOCK_D) that they serve: 16-bit inputs without bias on compute capability 8.x and 9.0 on; with
# bias, when a tile also holds times, buckets and the values gathered; float32.
FORWARD_80: dict[int, Tiles] = {
    64: ((64, 64, 4, 3), (128, 32, 4, 4)),
    128: ((64, 64, 4, 2),),
    256: ((64, 64, 8, 1), (64, 32, 8, 2)),
}
FORWARD_90: dict[int, Tiles] = {
    64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)),
    256: ((128, 64, 8, 2), (128, 32, 8, 3)),
}
FORWARD_BIAS_80: dict[int, Tiles] = {32: ((64, 64, 8, 1),), 128: ((64, 32, 8, 1),), 256: ((32, 32, 8, 1),)}
FORWARD_BIAS_90: dict[int, Tiles] = {
    64: ((64, 64, 8, 1), (64, 32, 4, 2), (128, 32, 8, 2)),
    128: ((64, 32, 8, 1), (64, 32, 8, 2)),
    256: ((64, 32, 8, 1), (32, 32, 4, 1)),
}
FORWARD_FLOAT32: dict[int, Tiles] = {64: ((32, 32, 4, 1),), 128: ((32, 16, 8, 1),), 256: ((16, 16, 8, 1),)}

KEYS_80: dict[int, Tiles] = {
    64: ((32, 64, 4, 2),),
    128: ((64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
    256: ((32, 32, 8, 1), (32, 64, 8, 1)),
}
KEYS_90: dict[int, Tiles] = {
    64: ((64, 128, 8, 2), (64, 64, 4, 2)),
    128: ((32, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 3)),
    256: ((32, 64, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
}
KEYS_BIAS_80: dict[int, Tiles] = {32: ((64, 64, 8, 1),), 128: ((32, 64, 8, 1),), 256: ((32, 32, 8, 1),)}
KEYS_BIAS_90: dict[int, Tiles] = {
    64: ((64, 64, 8, 1), (32, 64, 4, 2)),
    128: ((32, 64, 8, 1), (32, 64, 8, 2)),
    256: ((32, 32, 8, 1), (16, 32, 8, 1)),
}
KEYS_FLOAT32: dict[int, Tiles] = {64: ((32, 32, 8, 1),), 128: ((16, 16, 4, 1),), 256: ((16, 16, 8, 1),)}

QUERIES_80: dict[int, Tiles] = {
    64: ((128, 64, 8, 2), (64, 64, 4, 2)),
    128: ((64, 64, 8, 2), (128, 32, 8, 2)),
    256: ((64, 32, 8, 1), (64, 32, 8, 2)),
}
QUERIES_90: dict[int, Tiles] = {
    64: ((128, 64, 8, 3), (64, 64, 4, 3)),
    128: ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)),
    256: ((128, 32, 8, 2), (64, 64, 8, 2)),
}
QUERIES_BIAS_80: dict[int, Tiles] = {32: ((64, 64, 8, 1),), 128: ((64, 32, 8, 1),), 256: ((32, 32, 8, 1),)}
QUERIES_BIAS_90: dict[int, Tiles] = {
    64: ((64, 64, 8, 1), (64, 32, 8, 2)),
    128: ((64, 32, 8, 1), (64, 32, 4, 1)),
    256: ((32, 32, 8, 1),),
}
QUERIES_FLOAT32: dict[int, Tiles] = {128: ((16, 16, 4, 1),), 256: ((16, 16, 8, 1),)}
QUERIES_BIAS_FLOAT32: dict[int, Tiles] = {64: ((16, 16, 4, 1),), 128: ((16, 16, 4, 2),), 256: ((16, 16, 8, 1),)}

TABLES = {
    "forward": ((FORWARD_80, FORWARD_90), (FORWARD_BIAS_80, FORWARD_BIAS_90), (FORWARD_FLOAT32, FORWARD_FLOAT32)),
    "keys": ((KEYS_80, KEYS_90), (KEYS_BIAS_80, KEYS_BIAS_90), (KEYS_FLOAT32, KEYS_FLOAT32)),
    "queries": ((QUERIES_80, QUERIES_90), (QUERIES_BIAS_80, QUERIES_BIAS_90), (QUERIES_FLOAT32, QUERIES_BIAS_FLOAT32)),
}


def attention_configs(
    kernel: str, block_d: int, itemsize: int, has_bias: bool, capability: tuple[int, int]
) -> list[Config]:
    """Configurations of the kernel (forward, keys, queries) to choose from."""
    plain, with_bias, float32 = TABLES[kernel]
    by_capability = with_bias if has_bias else plain
    by_width = float32[has_bias] if itemsize > 2 else by_capability[capability >= (9, 0)]
    tiles = next(by_width[width] for width in sorted(by_width) if block_d <= width)
    return [Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in tiles]


def bias_config(block_d: int, itemsize: int, capability: tuple[int, int]) -> Config:
    """Configuration of the kernel that makes the gradients of the bias; its grid depends on the tile size."""
    if itemsize > 2:
        return Config({"BLOCK": 16}, num_warps=4 if block_d <= 64 else 8, num_stages=1)
    if block_d > 128:
        return Config({"BLOCK": 16}, num_warps=4, num_stages=1)
    return Config({"BLOCK": 64 if capability >= (9, 0) else 32}, num_warps=8, num_stages=1)
