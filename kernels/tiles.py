"""Tiles of the kernels, and what decides them. Literal lists with a reason each; nothing is tuned at run time, so
nothing has to be cached or can differ between two runs.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class TileConfig:
    """Tile of a kernel: block_m queries or tokens by block_n keys or outputs (by block_k channels), warps, stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0


# 64 keys a step: a Philox call serves 8 columns that are 8 apart, so narrower tiles waste draws. Four warps of 16 rows
# each fill 64 queries, and 196 tokens make four blocks. float32 dots are three tf32 ones and hold three times the
# operands: half the queries, or registers spill.
FORWARD = {
    (2, 64): TileConfig(64, 64, 4, 2),
    (2, 128): TileConfig(64, 64, 4, 2),
    (4, 64): TileConfig(64, 64, 4, 2),
    (4, 128): TileConfig(32, 64, 4, 1),
}
BACKWARD = {
    (2, 64): TileConfig(64, 64, 4, 2),
    (2, 128): TileConfig(64, 64, 8, 1),
    (4, 64): TileConfig(32, 64, 4, 1),
    (4, 128): TileConfig(32, 32, 4, 1),
}


# Jitter and project, by pass: tokens x outputs x channels. 272 and 192 channels are multiples of 16, not of 64: a
# step of 32 wastes least. The weight's gradient walks over tokens and redraws the noise of its own channels.
JITTER = {
    ("forward", 2): TileConfig(64, 128, 4, 2, 32),
    ("forward", 4): TileConfig(32, 64, 4, 2, 32),
    ("weight", 2): TileConfig(32, 64, 4, 2, 64),
    ("weight", 4): TileConfig(32, 64, 4, 2, 32),
    ("tokens", 2): TileConfig(64, 64, 4, 2, 32),
    ("tokens", 4): TileConfig(32, 32, 4, 2, 32),
}


def attention_config(table: dict[tuple[int, int], TileConfig], element_size: int, head_dim: int) -> TileConfig:
    """The tile for elements of that many bytes and heads of that width."""
    return table[element_size, 64 if head_dim <= 64 else 128]


def dot_precision() -> str:
    """How float32 dots are done: exactly, unless the user allows TF32 by torch's own switch."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@lru_cache(maxsize=256)
def any_block_hidden(height: int, width: int, radius_row: int, radius_col: int, block: int, other: int) -> bool:
    """Whether `_wholly_hidden` holds for some pair of blocks: if not, the kernel is compiled without the test."""

    def corners(first: int, size: int) -> tuple[int, int, int, int]:
        last = min(first + size, height * width) - 1
        top, bottom = first // width, last // width
        return top, bottom, *((first % width, last % width) if top == bottom else (0, width - 1))

    for first in range(0, height * width, block):
        top, bottom, left, right = corners(first, block)
        for start in range(0, height * width, other):
            other_top, other_bottom, other_left, other_right = corners(start, other)
            if (
                max(bottom - other_top, other_bottom - top) <= radius_row
                and max(right - other_left, other_right - left) <= radius_col
            ):
                return True
    return False
