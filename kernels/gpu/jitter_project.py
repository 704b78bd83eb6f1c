"""Jitter and project in Triton: norm, noise, add and matrix product in one pass; the noisy tokens never reach memory.

    T tokens, C channels in, O channels out; a program owns BLOCK_T tokens (or, for the weight's gradient, a tile of it)

noisy = token + scale / C * ||token||_2 * normal, where the token is jittered. The norm needs all of a token before the
first product, so a program reads its tokens twice; the second time they come from the cache. The noise is redrawn in
the backward pass.
"""

import triton
import triton.language as tl

from .philox import jitter_tile, jittered_token, noise_start


@triton.jit
def _load_tokens(ptr, token, first_channel, tokens, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_T, BLOCK_C] of contiguous [T, C], zeros beyond it."""
    channel = first_channel + tl.arange(0, BLOCK_C)
    mask = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(ptr + token.to(tl.int64)[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load_weight(
    ptr, first_out, first_channel,
    OUT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_O, BLOCK_C] of contiguous [O, C], zeros beyond it."""
    row, channel = first_out + tl.arange(0, BLOCK_O), first_channel + tl.arange(0, BLOCK_C)
    mask = (row < OUT)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(ptr + row[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _deviation(
    token_ptr, token, tokens, seed, start, scale_by_channels, prob_threshold,
    CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """(deviation [BLOCK_T] of the noise of each token, its norm): scale / C * norm, 0 where the token stays clean."""
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for first_channel in range(0, CHANNELS, BLOCK_C):
        part = _load_tokens(token_ptr, token, first_channel, tokens, CHANNELS, BLOCK_C).to(tl.float32)
        squares += tl.sum(part * part, axis=1)
    norm = tl.sqrt(squares)
    factor = tl.full((BLOCK_T,), 1.0, tl.float32) * scale_by_channels
    if SOME:
        factor = tl.where(jittered_token(seed, start + token, prob_threshold), factor, 0.0)
    return factor * norm, norm, factor


@triton.jit
def forward_kernel(
    token_ptr,  # [T, C], contiguous
    weight_ptr,  # [O, C], contiguous
    bias_ptr,  # [O]
    out_ptr,  # [T, O], contiguous
    deviation_ptr,  # float32 [T], kept for the backward pass
    seed_ptr,  # int64 [], or [2] of a PART of the tokens
    tokens, scale_by_channels, prob_threshold,
    CHANNELS: tl.constexpr, OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr, SOME: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of the output, all O channels of it in turn a program a BLOCK_O."""
    OUT_BLOCKS: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    token = tl.program_id(0) // OUT_BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
    first_out = tl.program_id(0) % OUT_BLOCKS * BLOCK_O
    seed, start = tl.load(seed_ptr), noise_start(seed_ptr, PART)
    deviation, _, _ = _deviation(
        token_ptr, token, tokens, seed, start, scale_by_channels, prob_threshold, CHANNELS, BLOCK_T, BLOCK_C, SOME
    )
    if first_out == 0:
        tl.store(deviation_ptr + token, deviation, mask=token < tokens)
    accumulator = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first_channel in range(0, CHANNELS, BLOCK_C):
        part = _load_tokens(token_ptr, token, first_channel, tokens, CHANNELS, BLOCK_C)
        normals = jitter_tile(seed, start + token, first_channel, BLOCK_T, BLOCK_C)
        noisy = (part.to(tl.float32) + deviation[:, None] * normals).to(part.dtype)
        weight = _load_weight(weight_ptr, first_out, first_channel, OUT, CHANNELS, BLOCK_O, BLOCK_C)
        accumulator = tl.dot(noisy, tl.trans(weight), accumulator, input_precision=PRECISION)
    row = first_out + tl.arange(0, BLOCK_O)
    if BIAS:
        accumulator += tl.load(bias_ptr + row, mask=row < OUT, other=0.0).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (row < OUT)[None, :]
    out = accumulator.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * OUT + row[None, :], out, mask=mask)


@triton.jit
def weight_gradient_kernel(
    token_ptr, out_gradient_ptr,  # [T, C] and [T, O], contiguous
    deviation_ptr,  # float32 [T]
    part_ptr,  # float32 [SPLITS, O * C + O], without BIAS [SPLITS, O * C]: each split's sums, then the bias's
    seed_ptr,
    tokens, tokens_per_split,
    CHANNELS: tl.constexpr, OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_O, BLOCK_C] tile of the weight's gradient over one split of the tokens, the noise redrawn."""
    OUT_BLOCKS: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) // (OUT_BLOCKS * CHANNEL_BLOCKS)
    tile = tl.program_id(0) % (OUT_BLOCKS * CHANNEL_BLOCKS)
    first_out, first_channel = tile // CHANNEL_BLOCKS * BLOCK_O, tile % CHANNEL_BLOCKS * BLOCK_C
    row, channel = first_out + tl.arange(0, BLOCK_O), first_channel + tl.arange(0, BLOCK_C)
    seed, start = tl.load(seed_ptr), noise_start(seed_ptr, PART)
    accumulator = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    bias_accumulator = tl.zeros((BLOCK_O,), tl.float32)
    end = tl.minimum(split * tokens_per_split + tokens_per_split, tokens)
    for first in range(split * tokens_per_split, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        part = _load_tokens(token_ptr, token, first_channel, tokens, CHANNELS, BLOCK_C)
        gradient = _load_tokens(out_gradient_ptr, token, first_out, tokens, OUT, BLOCK_O)
        deviation = tl.load(deviation_ptr + token, mask=token < tokens, other=0.0)
        normals = jitter_tile(seed, start + token, first_channel, BLOCK_T, BLOCK_C)
        noisy = (part.to(tl.float32) + deviation[:, None] * normals).to(part.dtype)
        accumulator = tl.dot(tl.trans(gradient), noisy, accumulator, input_precision=PRECISION)
        if BIAS:
            bias_accumulator += tl.sum(gradient.to(tl.float32), axis=0)
    mask = (row < OUT)[:, None] & (channel < CHANNELS)[None, :]
    part_ptr += split.to(tl.int64) * (OUT * CHANNELS + OUT * BIAS)
    tl.store(part_ptr + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :], accumulator, mask=mask)
    if BIAS and first_channel == 0:
        tl.store(part_ptr + OUT * CHANNELS + row, bias_accumulator, mask=row < OUT)


@triton.jit
def token_gradient_kernel(
    token_ptr, weight_ptr, out_gradient_ptr,  # [T, C], [O, C], [T, O], contiguous
    token_gradient_ptr,  # [T, C], contiguous
    seed_ptr,
    tokens, scale_by_channels, prob_threshold,
    CHANNELS: tl.constexpr, OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    SOME: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_T tokens, through the product and through the norm.

    With g = out_gradient W and z the normals: d token = g + factor * (g . z) * token / norm. The dot product g . z is
    over all channels, so a first walk gathers it and a second one writes.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    seed, start = tl.load(seed_ptr), noise_start(seed_ptr, PART)
    _, norm, factor = _deviation(
        token_ptr, token, tokens, seed, start, scale_by_channels, prob_threshold, CHANNELS, BLOCK_T, BLOCK_C, SOME
    )
    along_noise = tl.zeros((BLOCK_T,), tl.float32)
    for WRITE in tl.static_range(2):
        for first_channel in range(0, CHANNELS, BLOCK_C):
            through = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            for first_out in range(0, OUT, BLOCK_O):
                gradient = _load_tokens(out_gradient_ptr, token, first_out, tokens, OUT, BLOCK_O)
                weight = _load_weight(weight_ptr, first_out, first_channel, OUT, CHANNELS, BLOCK_O, BLOCK_C)
                through = tl.dot(gradient, weight, through, input_precision=PRECISION)
            if WRITE:
                part = _load_tokens(token_ptr, token, first_channel, tokens, CHANNELS, BLOCK_C).to(tl.float32)
                # A zero token has no direction: its norm's gradient is taken as zero, as torch does.
                slope = tl.where(norm > 0, factor * along_noise / tl.where(norm > 0, norm, 1.0), 0.0)
                value = (through + slope[:, None] * part).to(token_gradient_ptr.dtype.element_ty)
                channel = first_channel + tl.arange(0, BLOCK_C)
                mask = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
                offsets = token.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
                tl.store(token_gradient_ptr + offsets, value, mask=mask)
            else:
                normals = jitter_tile(seed, start + token, first_channel, BLOCK_T, BLOCK_C)
                along_noise += tl.sum(through * normals, axis=1)
