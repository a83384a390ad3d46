"""Tile sizes of the attention kernels, by head dim. The first of a list is what runs where nothing may be measured."""

from __future__ import annotations

from triton import Config

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by widest tile (BLOCK_D) that they serve, 16-bit inputs.
Tiles = tuple[tuple[int, int, int, int], ...]

FORWARD_90: dict[int, Tiles] = {
    64: ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)),
    256: ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)),
}
FORWARD_80: dict[int, Tiles] = {
    64: ((128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 4)),
    128: ((128, 64, 8, 2), (128, 32, 4, 3), (64, 64, 4, 3)),
    256: ((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)),
}
KEYS_90: dict[int, Tiles] = {
    64: ((64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)),
    128: ((64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
    256: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2)),
}
KEYS_80: dict[int, Tiles] = {
    64: ((64, 64, 4, 2), (32, 64, 4, 3)),
    128: ((32, 64, 4, 2), (64, 64, 8, 2)),
    256: ((32, 64, 8, 1), (16, 64, 4, 1)),
}
QUERIES_90: dict[int, Tiles] = {
    64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2)),
    128: ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)),
    256: ((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
}
QUERIES_80: dict[int, Tiles] = {
    64: ((128, 64, 4, 2), (64, 64, 4, 2)),
    128: ((64, 64, 4, 2), (128, 32, 8, 2)),
    256: ((64, 32, 4, 1), (64, 32, 8, 2)),
}
# With a bias a tile also holds times, buckets and the values gathered; in float32 tiles are twice as large.
SMALL: dict[int, Tiles] = {
    64: ((64, 32, 4, 2), (64, 64, 8, 1), (32, 32, 4, 2)),
    128: ((64, 32, 4, 1), (32, 32, 4, 2), (32, 32, 4, 1)),
    256: ((32, 32, 4, 1), (64, 32, 8, 1)),
}
BY_NAME = {"forward": (FORWARD_80, FORWARD_90), "keys": (KEYS_80, KEYS_90), "queries": (QUERIES_80, QUERIES_90)}


def attention_configs(
    kernel: str, block_d: int, itemsize: int, has_bias: bool, capability: tuple[int, int]
) -> list[Config]:
    """Configurations of the kernel (forward, keys, queries) to choose from."""
    tables = BY_NAME[kernel]
    by_width = SMALL if has_bias or itemsize > 2 else tables[capability >= (9, 0)]
    tiles = next(by_width[width] for width in sorted(by_width) if block_d <= width)
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in tiles
    ]


def bias_config(block_d: int) -> Config:
    """Configuration of the kernel that makes the gradients of the bias; its grid depends on the tile size."""
    block, warps = (64, 8) if block_d <= 128 else (32, 4)
    return Config({"BLOCK": block}, num_warps=warps, num_stages=1)
