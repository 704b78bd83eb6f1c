"""Counter-based noise in Triton: the same bits as `uniad_fast.ops.noise` defines, drawn inside a tile.

Philox-4x32-10 keyed by a 64-bit seed; a counter is (column group, row, plane, stream). See that file for which bits
serve which element; here is only how a tile gets them without a shuffle.
"""

import triton
import triton.language as tl

KEEP = tl.constexpr(0)
JITTER = tl.constexpr(1)
JITTER_TOKEN = tl.constexpr(2)


@triton.jit
def noise_start(seed_ptr, PART: tl.constexpr):
    """Number that the first plane, row or token has among those that noise is drawn for: `seed_ptr` [2] says, or 0."""
    return tl.load(seed_ptr + 1).to(tl.int32) if PART else 0


@triton.jit
def keep_tile(seed, plane, row, first_col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout decisions [BLOCK_M, BLOCK_N] of stream KEEP: True where the element is kept.

    row [BLOCK_M]; the columns start at first_col, a multiple of BLOCK_N, which is 16, 32 or a multiple of 64.
    A call's eight 16-bit draws go to eight columns that are 8 apart, so a tile narrower than 64 uses part of a call.
    """
    CALLS: tl.constexpr = 8 if BLOCK_N < 64 else BLOCK_N // 8
    group = first_col // 64 * 8 + tl.arange(0, CALLS)
    w0, w1, w2, w3 = tl.philox(seed, group[None, :], row[:, None], plane, KEEP)  # [BLOCK_M, CALLS] each
    # `words` [BLOCK_M, WORDS, 8]: the word that serves 16 neighbouring columns, for every column modulo 8.
    WORDS: tl.constexpr = BLOCK_N // 16
    if BLOCK_N == 16:
        quarter = first_col // 16 % 4
        words = tl.where(quarter < 2, tl.where(quarter == 0, w0, w1), tl.where(quarter == 2, w2, w3))
        words = words[:, None, :]
    elif BLOCK_N == 32:
        second = first_col // 32 % 2 == 1
        words = tl.permute(tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1)), (0, 2, 1))
    else:
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [BLOCK_M, CALLS, word % 2, word // 2]
        words = tl.reshape(words, (BLOCK_M, BLOCK_N // 64, 8, 2, 2))
        words = tl.reshape(tl.permute(words, (0, 1, 4, 3, 2)), (BLOCK_M, WORDS, 8))
    shift = 16 * tl.arange(0, 2)
    bits = (words[:, :, None, :] >> shift[None, None, :, None].to(tl.uint32)) & 0xFFFF
    return tl.reshape(bits >= threshold, (BLOCK_M, BLOCK_N))


@triton.jit
def jitter_tile(seed, token, first_channel, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Standard normals [BLOCK_M, BLOCK_C] of stream JITTER, for token [BLOCK_M] and channels from first_channel on.

    first_channel is a multiple of BLOCK_C, which is a multiple of 4: one call serves four neighbouring channels.
    """
    group = first_channel // 4 + tl.arange(0, BLOCK_C // 4)
    w0, w1, w2, w3 = tl.philox(seed, group[None, :], token[:, None], 0, JITTER)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK_M, BLOCK_C))


@triton.jit
def jittered_token(seed, token, threshold):
    """Decisions of stream JITTER_TOKEN, shape of token: True where it gets noise; threshold = round(prob * 2**24)."""
    word, _, _, _ = tl.philox(seed, tl.zeros_like(token), token, 0, JITTER_TOKEN)
    return (word >> 8).to(tl.int32) < threshold


@triton.jit
def _normal_pair(radius_word, angle_word):
    """Two standard normals from two words, by Box and Muller."""
    radius_u = ((radius_word >> 8).to(tl.int32) + 1).to(tl.float32) * 2.0**-24
    angle_u = ((angle_word >> 8).to(tl.int32) + 1).to(tl.float32) * 2.0**-24
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(radius_u), 0.0))
    # The library's sine carries a slow path for huge angles, in local memory; these are quarters of one turn.
    quarter = tl.floor(4.0 * angle_u + 0.5)
    angle = (4.0 * angle_u - quarter) * 1.5707963267948966  # in [-pi / 4, pi / 4]
    square = angle * angle
    sine = angle * (1.0 + square * (-1.6666654611e-1 + square * (8.3321608736e-3 + square * -1.9515295891e-4)))
    cosine = 1.0 + square * (
        -0.5 + square * (4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    )
    turn = quarter.to(tl.int32) % 4
    swapped = turn % 2 == 1
    first = tl.where(swapped, sine, cosine)
    second = tl.where(swapped, cosine, sine)
    first = tl.where((turn == 1) | (turn == 2), -first, first)
    second = tl.where(turn >= 2, -second, second)
    return radius * first, radius * second
