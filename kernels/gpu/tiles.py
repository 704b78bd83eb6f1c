"""Tiles of the kernels, and what decides them. Literal lists with a reason each; nothing is tuned at run time, so
nothing has to be cached or can differ between two runs.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class TileConfig:
    """Tile of a kernel: block_m queries or tokens by block_n keys or outputs (by block_k channels), warps, stages.

    precision: of float32 dots, where TF32 is not allowed: three of tf32, or "ieee" on the ordinary units.
    whole: block_n holds every key, for the kernel that has one program a head.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0
    precision: str = "tf32x3"
    whole: bool = False


# By kernel, bytes of an element, and width of a head. 64 keys a step: a Philox call serves eight columns that are
# eight apart, so narrower tiles waste draws; 196 tokens make four blocks of 64. Key gradients hold two accumulators
# and both orders of the weights, so wide heads get smaller steps; at a width of 32, 64 keys are what `wgmma` wants.
# float32 dots are three of tf32, whose halves double the operands: the tile shrinks until registers hold it on every
# chip. For the widest heads' key gradients no tile is small enough, and the ordinary units do them.
ATTENTION = {
    ("forward_kernel", 2, 64): TileConfig(64, 64, 4, 2),
    ("forward_kernel", 2, 128): TileConfig(64, 64, 8, 2),
    ("forward_kernel", 4, 32): TileConfig(64, 32, 4, 1),
    ("forward_kernel", 4, 64): TileConfig(32, 32, 8, 1),
    ("forward_kernel", 4, 128): TileConfig(16, 32, 4, 1),
    ("query_gradient_kernel", 2, 32): TileConfig(64, 64, 4, 2),
    ("query_gradient_kernel", 2, 64): TileConfig(64, 32, 4, 2),
    ("query_gradient_kernel", 2, 128): TileConfig(32, 64, 8, 1),
    ("query_gradient_kernel", 4, 32): TileConfig(64, 32, 8, 1),
    ("query_gradient_kernel", 4, 64): TileConfig(16, 32, 4, 1),
    ("query_gradient_kernel", 4, 128): TileConfig(16, 16, 4, 1),
    ("key_value_gradient_kernel", 2, 32): TileConfig(64, 64, 4, 1),
    ("key_value_gradient_kernel", 2, 64): TileConfig(64, 32, 4, 2),
    ("key_value_gradient_kernel", 2, 128): TileConfig(32, 64, 8, 1),
    ("key_value_gradient_kernel", 4, 32): TileConfig(16, 16, 4, 1),
    ("key_value_gradient_kernel", 4, 64): TileConfig(16, 16, 4, 1),
    ("key_value_gradient_kernel", 4, 128): TileConfig(32, 16, 8, 1, precision="ieee"),
}
# AMD's waves are 64 wide, and eight of them leave 256 registers each where four may have 512. With 64 keys the key
# gradients take one register more than two programs on a multiprocessor may have.
ATTENTION_AMD = ATTENTION | {
    ("key_value_gradient_kernel", 2, 32): TileConfig(64, 32, 4, 2),
    ("query_gradient_kernel", 2, 128): TileConfig(64, 32, 4, 1),
    ("key_value_gradient_kernel", 2, 128): TileConfig(32, 32, 4, 1),
    ("key_value_gradient_kernel", 4, 128): TileConfig(32, 16, 4, 1),
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


def attention_tile(
    kernel: str, element_size: int, head_dim: int, amd: bool = torch.version.hip is not None
) -> TileConfig:
    """The tile of that kernel for elements of so many bytes and heads of that width."""
    table = ATTENTION_AMD if amd else ATTENTION
    width = next(w for w in (32, 64, 128) if head_dim <= w and (kernel, element_size, w) in table)
    return table[kernel, element_size, width]


def whole_sequence_tile(tokens: int, element_size: int, head_dim: int, blackwell: bool) -> TileConfig | None:
    """The tile for one program a head in the forward pass, or None where a program a block of queries is better.

    Up to 64 tokens are one block anyway. 256 keys fill the registers at a width of 32 in 16 bits; beyond that, and
    with Blackwell's accumulators, which are read back through registers, they spill.
    """
    if blackwell or element_size != 2 or head_dim > 32 or not 64 < tokens <= 256:
        return None
    return TileConfig(64, 128 if tokens <= 128 else 256, 4, 1, whole=True)


def whole_sequence_gradient_tile(tokens: int, element_size: int, head_dim: int, warpgroups: bool) -> TileConfig | None:
    """The tile for one program a head in the backward pass, or None where a kernel each for queries and keys is better.

    The gradients of all queries stay in registers: 16-bit elements to a width of 32; wider heads and float32 spill.
    warpgroups: four warps multiply together (Hopper, and Blackwell for data centers). Four warps spill there with
    dropout, and eight, whose blocks of queries are twice as high, do not; elsewhere eight would do half of two
    products twice. With 64 keys they fit at 14 x 14 and spill up to 56 bytes on Ampere at other sizes, so those have
    32.
    """
    if element_size != 2 or head_dim > 32 or not 64 < tokens <= 256:
        return None
    if warpgroups:
        return TileConfig(128, 64, 8, 1, whole=True)
    return TileConfig(64, 64 if tokens == 196 else 32, 4, 1, whole=True)


def dot_precision(tile: TileConfig) -> str:
    """How float32 dots are done: exactly, unless the user allows TF32 by torch's own switch."""
    if tile.precision == "ieee" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if _tf32_is_allowed() else tile.precision


def _tf32_is_allowed() -> bool:
    """Torch's switch for products on a GPU, by its newer name (2.9) where there is one.

    The older name may not be read once the newer one has been set. The newer one follows torch.backends.fp32_precision.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


@lru_cache(maxsize=256)
def skipping_pays(height: int, width: int, radius_row: int, radius_col: int, block: int, other: int) -> bool:
    """Whether enough pairs of blocks are wholly hidden for a kernel to be compiled with the test that skips them.

    A branch around the loads keeps the next block's from being fetched ahead, so a tenth of the blocks must be worth
    it. 14 x 14 with a 7 x 7 window has one in sixteen: the last four tokens, by themselves.
    """

    def corners(first: int, size: int) -> tuple[int, int, int, int]:
        last = min(first + size, height * width) - 1
        top, bottom = first // width, last // width
        return top, bottom, *((first % width, last % width) if top == bottom else (0, width - 1))

    starts, others = range(0, height * width, block), range(0, height * width, other)
    other_corners = [corners(start, other) for start in others]
    hidden = 0
    for top, bottom, left, right in (corners(start, block) for start in starts):
        for other_top, other_bottom, other_left, other_right in other_corners:
            rows = max(bottom - other_top, other_bottom - top)
            cols = max(right - other_left, other_right - left)
            hidden += rows <= radius_row and cols <= radius_col
    return hidden >= 0.1 * len(starts) * len(others)
