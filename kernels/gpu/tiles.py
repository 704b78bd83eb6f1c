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
# chip, and the warps until none does another's products again. For the widest heads' key gradients no tile is small
# enough, and the ordinary units do them.
ATTENTION = {
    ("forward_kernel", 2, 64): TileConfig(64, 64, 4, 2),
    ("forward_kernel", 2, 128): TileConfig(64, 64, 8, 2),
    ("forward_kernel", 4, 32): TileConfig(64, 32, 4, 1),
    ("forward_kernel", 4, 64): TileConfig(32, 32, 8, 1),
    ("forward_kernel", 4, 128): TileConfig(16, 32, 4, 1),
    ("query_gradient_kernel", 2, 32): TileConfig(64, 64, 4, 2),
    ("query_gradient_kernel", 2, 64): TileConfig(64, 32, 4, 2),
    ("query_gradient_kernel", 2, 128): TileConfig(32, 64, 8, 1),
    ("query_gradient_kernel", 4, 32): TileConfig(64, 16, 4, 1),
    ("query_gradient_kernel", 4, 64): TileConfig(16, 32, 4, 1),
    ("query_gradient_kernel", 4, 128): TileConfig(16, 16, 4, 1),
    ("key_value_gradient_kernel", 2, 32): TileConfig(64, 64, 4, 1),
    ("key_value_gradient_kernel", 2, 64): TileConfig(64, 32, 4, 2),
    ("key_value_gradient_kernel", 2, 128): TileConfig(32, 64, 8, 1),
    ("key_value_gradient_kernel", 4, 32): TileConfig(16, 16, 2, 1),
    ("key_value_gradient_kernel", 4, 64): TileConfig(16, 16, 4, 1),
    ("key_value_gradient_kernel", 4, 128): TileConfig(32, 16, 8, 1, precision="ieee"),
}
# Where four warps multiply together, 64 keys make float32's key gradients one product for all of them.
ATTENTION_HOPPER = ATTENTION | {("key_value_gradient_kernel", 4, 32): TileConfig(16, 64, 4, 1)}
# Blackwell's accumulators for data centers lie outside the registers, and cost least where there are few steps.
ATTENTION_BLACKWELL = ATTENTION_HOPPER | {("query_gradient_kernel", 4, 32): TileConfig(64, 32, 8, 1)}
# AMD's waves are 64 wide, and eight of them leave 256 registers each where four may have 512. With 64 keys the key
# gradients take one register more than two programs on a multiprocessor may have.
ATTENTION_AMD = ATTENTION | {
    ("query_gradient_kernel", 4, 32): TileConfig(64, 32, 8, 1),
    ("key_value_gradient_kernel", 4, 32): TileConfig(16, 16, 4, 1),
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


def attention_tile(kernel: str, element_size: int, head_dim: int, chip: str) -> TileConfig:
    """The tile of that kernel for elements of so many bytes and heads of that width; `chip` as `chip_of` names it."""
    # The interpreter takes a time for each step, however large: it has the tiles that have fewest.
    tables = {"sm_9": ATTENTION_HOPPER, "sm_10": ATTENTION_BLACKWELL, "gfx": ATTENTION_AMD, "": ATTENTION_BLACKWELL}
    table = tables.get(_generation(chip), ATTENTION)
    width = next(w for w in (32, 64, 128) if head_dim <= w and (kernel, element_size, w) in table)
    return table[kernel, element_size, width]


def whole_sequence_tile(tokens: int, element_size: int, head_dim: int, windowed: bool, chip: str) -> TileConfig | None:
    """The tile for one program a head in the forward pass, or None where a program a block of queries is better.

    Up to 64 tokens are one block anyway. 256 keys fill the registers at a width of 32 in 16 bits; beyond that, and
    with Blackwell's accumulators, which are read back through registers, they spill. On sm_80 to 89 eight warps, with
    blocks of queries twice as high, leave room for what four spill; beyond 15 x 15 not without a window.
    """
    generation = _generation(chip)
    if generation in ("sm_10", "sm_12") or element_size != 2 or head_dim > 32 or not 64 < tokens <= 256:
        return None
    if tokens <= 128:
        return TileConfig(64, 128, 4, 1, whole=True)
    if generation != "sm_8":
        return TileConfig(64, 256, 4, 1, whole=True)
    return TileConfig(128, 256, 8, 1, whole=True) if windowed or tokens <= 225 else None


def whole_sequence_gradient_tile(tokens: int, element_size: int, head_dim: int, chip: str) -> TileConfig | None:
    """The tile for one program a head in the backward pass, or None where a kernel each for queries and keys is better.

    The gradients of all queries stay in registers: 16-bit elements to a width of 32; wider heads and float32 spill.
    Eight warps, whose blocks of queries are twice as high, do half of two products twice where no four multiply
    together; they cost as much as four all the same, and are the ones that fit on Hopper and sm_86 to 89. On Ampere's
    sm_80 it is four, and 32 keys at other sizes than 14 x 14; on Blackwell 32 keys where 64 spill.
    """
    if element_size != 2 or head_dim > 32 or not 64 < tokens <= 256:
        return None
    generation = _generation(chip)
    fits_blackwell = tokens <= 144 or tokens in (196, 256)
    is_ada = generation == "sm_8" and chip != "sm_80"
    if generation == "sm_9" or is_ada or (generation == "sm_10" and fits_blackwell):
        return TileConfig(128, 64, 8, 1, whole=True)
    wide = tokens == 196 and generation not in ("sm_10", "sm_12")
    return TileConfig(64, 64 if wide else 32, 4, 1, whole=True)


def chip_of(device: torch.device) -> str:
    """The name of a GPU's kind: "sm_90" of NVIDIA's by compute capability, "gfx" of AMD's; "" in the interpreter."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _generation(chip: str) -> str:
    """What a chip's kernels are chosen by: "sm_9" of "sm_90", "gfx" of "gfx942"; sm_11 is of Blackwell's, as sm_10."""
    if chip.startswith("gfx"):
        return "gfx"
    return "sm_10" if chip[:-1] == "sm_11" else chip[:-1]


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
