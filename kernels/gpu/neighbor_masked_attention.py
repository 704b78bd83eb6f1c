"""Neighbour-masked attention in Triton: FlashAttention's scheme, with a 2D window that hides keys.

    B batch, H heads, N = HEIGHT * WIDTH tokens numbered row by row, D head_dim
    a program owns BLOCK_M queries (or, for key gradients, BLOCK_N keys) of one head and walks over the other side

Token order decides which blocks need the window at all. Tokens run row by row, so the blocks that can hold a neighbour
of this one are one contiguous range; before and after it everything is visible and no mask is computed. Within the
range a block may still be wholly hidden, which its corners tell before anything is loaded.

Softmax is in base 2 with float32 accumulators. Each row's log-sum-exp is kept for the backward pass, which computes
the weights and redraws the dropout again; nothing of N x N elements exists, and no gradient is summed by atomics.
"""

import triton
import triton.language as tl

from .philox import keep_tile, noise_start


@triton.jit
def near_blocks(
    first, BLOCK: tl.constexpr, OTHER: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr
):
    """[begin, end) of the full blocks of OTHER tokens that may hold a neighbour of tokens [first, first + BLOCK).

    All other full blocks are wholly visible. The last block, when it is not full, is left to the caller.
    """
    N: tl.constexpr = HEIGHT * WIDTH
    last = tl.minimum(first + BLOCK, N) - 1
    near_first = tl.maximum(first // WIDTH - RADIUS_ROW, 0) * WIDTH
    near_last = tl.minimum(last // WIDTH + RADIUS_ROW + 1, HEIGHT) * WIDTH
    begin = tl.minimum(near_first // OTHER, N // OTHER)
    end = tl.minimum((near_last + OTHER - 1) // OTHER, N // OTHER)
    return begin, tl.maximum(begin, end)


@triton.jit
def block_at(step, begin, end, FULL_BLOCKS: tl.constexpr, MASKED: tl.constexpr):
    """The block of a loop's step: the near ones and then the last, not full one; or all the visible ones."""
    if MASKED:
        block = tl.where(step < end - begin, begin + step, FULL_BLOCKS)
    else:
        block = tl.where(step < begin, step, step + end - begin)
    return block


@triton.jit
def _wholly_hidden(
    first, BLOCK: tl.constexpr, other, OTHER: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
):  # fmt: skip
    """Whether every token of [first, first + BLOCK) has every token of [other, other + OTHER) in its window."""
    N: tl.constexpr = HEIGHT * WIDTH
    last, other_last = tl.minimum(first + BLOCK, N) - 1, tl.minimum(other + OTHER, N) - 1
    top, bottom, other_top, other_bottom = first // WIDTH, last // WIDTH, other // WIDTH, other_last // WIDTH
    # A run that goes over a row's end touches both borders, as far as its corners tell.
    left, right = tl.where(top == bottom, first % WIDTH, 0), tl.where(top == bottom, last % WIDTH, WIDTH - 1)
    other_left = tl.where(other_top == other_bottom, other % WIDTH, 0)
    other_right = tl.where(other_top == other_bottom, other_last % WIDTH, WIDTH - 1)
    rows = tl.maximum(bottom - other_top, other_bottom - top)
    cols = tl.maximum(right - other_left, other_right - left)
    return (rows <= RADIUS_ROW) & (cols <= RADIUS_COL)


@triton.jit
def _visible(
    query, key, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: True where query [BLOCK_M] sees key [BLOCK_N]. The window test, in its one place.

    Each distance is one unsigned comparison: below -radius it wraps to a huge number.
    """
    inside = (key < HEIGHT * WIDTH)[None, :]
    if RADIUS_ROW < 0:
        return inside & (query >= 0)[:, None]
    key_row = key // WIDTH
    query_row, query_col = query // WIDTH, query % WIDTH
    row = (key_row[None, :] - (query_row - RADIUS_ROW)[:, None]).to(tl.uint32, bitcast=True)
    col = ((key - key_row * WIDTH)[None, :] - (query_col - RADIUS_COL)[:, None]).to(tl.uint32, bitcast=True)
    visible = (row > 2 * RADIUS_ROW) | (col > 2 * RADIUS_COL)
    return visible & inside if HEIGHT * WIDTH % BLOCK_N != 0 else visible


@triton.jit
def load_tokens(
    ptr, first, stride, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tokens [first, first + BLOCK) of one head as [BLOCK, BLOCK_D], zeros beyond N and HEAD_DIM."""
    token, channel = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    start = ptr + first.to(tl.int64) * stride
    offsets = token[:, None] * stride + channel[None, :]
    if N % BLOCK == 0 and HEAD_DIM == BLOCK_D:
        return tl.load(start + offsets)
    return tl.load(start + offsets, mask=(first + token < N)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tokens(
    ptr, value, first, stride, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    token, channel = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (first + token < N)[:, None] & (channel < HEAD_DIM)[None, :]
    offsets = token[:, None] * stride + channel[None, :]
    tl.store(ptr + first.to(tl.int64) * stride + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def query_key_products(
    query, key, query_first, key_first,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query times key, [BLOCK_M, BLOCK_N] in float32, -inf where hidden.

    Not scaled yet: scaling, which is by a positive number, and subtracting are then one instruction.
    """
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        query_token, key_token = query_first + tl.arange(0, BLOCK_M), key_first + tl.arange(0, BLOCK_N)
        visible = _visible(query_token, key_token, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL, BLOCK_N)
        products = tl.where(visible, products, float("-inf"))
    return products


@triton.jit
def store_stats(stats_ptr, maximum, total, empty, plane, token, N: tl.constexpr):
    """Keeps a softmax in two numbers (0 and inf without a key): their sum would be rounded to a large one's unit."""
    stats_ptr += plane.to(tl.int64) * 2 * N + token
    tl.store(stats_ptr, tl.where(empty, 0.0, maximum), mask=token < N)
    tl.store(stats_ptr + N, tl.where(empty, float("inf"), tl.log2(total)), mask=token < N)


@triton.jit
def load_stats(stats_ptr, plane, token, N: tl.constexpr):
    """(largest product, base-2 log of the sum) of each token's softmax; beyond N, as without key."""
    stats_ptr += plane.to(tl.int64) * 2 * N + token
    maximum = tl.load(stats_ptr, mask=token < N, other=0.0)
    return maximum, tl.load(stats_ptr + N, mask=token < N, other=float("inf"))


@triton.jit
def forward_kernel(
    query_ptr, key_ptr, value_ptr,  # [B or 1, H, N, D], [B, H, N, D] twice, by stride
    out_ptr,  # [B, H, N, D], by stride
    stats_ptr,  # float32 [B * H, 2, N]: largest product, not scaled, and base-2 log of the sum relative to it
    seed_ptr,  # int64 [], or [2] of a PART of the batch
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    heads, scale_log2, keep_threshold, keep_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PART: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BLOCK_M queries of one head, by online softmax over the key blocks."""
    N: tl.constexpr = HEIGHT * WIDTH
    QUERY_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    plane = tl.program_id(0) // QUERY_BLOCKS
    first = tl.program_id(0) % QUERY_BLOCKS * BLOCK_M
    batch, head = (plane // heads).to(tl.int64), plane % heads
    query_ptr += batch * query_stride_b + head * query_stride_h
    key_ptr += batch * key_stride_b + head * key_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h

    query = load_tokens(query_ptr, first, query_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
    seed, noise_plane = tl.load(seed_ptr) if DROPOUT else 0, plane + noise_start(seed_ptr, PART)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    begin, end = near_blocks(first, BLOCK_M, BLOCK_N, HEIGHT, WIDTH, RADIUS_ROW)
    FULL_BLOCKS: tl.constexpr = N // BLOCK_N
    for MASKED in tl.static_range(2):
        blocks = end - begin + (N % BLOCK_N != 0) if MASKED else FULL_BLOCKS - (end - begin)
        for step in range(0, blocks):
            key_first = block_at(step, begin, end, FULL_BLOCKS, MASKED) * BLOCK_N
            hidden = False
            if MASKED and SKIP:
                hidden = _wholly_hidden(first, BLOCK_M, key_first, BLOCK_N, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL)
            if not hidden:
                key = load_tokens(key_ptr, key_first, key_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
                value = load_tokens(value_ptr, key_first, value_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
                products = query_key_products(
                    query, key, first, key_first, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL,
                    BLOCK_M, BLOCK_N, MASKED, PRECISION,
                )  # fmt: skip
                new_max = tl.maximum(running_max, tl.max(products, axis=1))
                # A row that has seen no key yet keeps a finite pivot: -inf - -inf would be NaN.
                pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
                weights = tl.exp2((products - pivot[:, None]) * scale_log2)
                correction = tl.exp2((running_max - pivot) * scale_log2)
                running_sum = running_sum * correction + tl.sum(weights, axis=1)
                running_max = new_max
                if DROPOUT:
                    keep = keep_tile(
                        seed, noise_plane, first + tl.arange(0, BLOCK_M), key_first, keep_threshold, BLOCK_M, BLOCK_N
                    )
                    weights = tl.where(keep, weights, 0.0)
                accumulator = accumulator * correction[:, None]
                accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=PRECISION)

    empty = running_sum == 0.0
    total = tl.where(empty, 1.0, running_sum)
    # Without a key the output is 0, whatever the values are: 0 * inf would be NaN.
    out = tl.where(empty[:, None], 0.0, accumulator * (keep_scale / total)[:, None])
    store_tokens(out_ptr, out, first, out_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_stats(stats_ptr, running_max, total, empty, plane, first + tl.arange(0, BLOCK_M), N)


@triton.jit
def softmax_weights(products, maximum, log_sum, scale_log2):
    """Softmax weights of products, neither scaled, from the stats that the forward pass kept.

    The difference first: of large products it is exact, and their scaled values are not. No weight is above 1, but
    the products of another tile differ by a rounding from those whose maximum was kept.
    """
    exponent = (products - maximum[:, None]) * scale_log2 - log_sum[:, None]
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _score_gradient(
    query, key, value, out_gradient, maximum, log_sum, delta, seed, noise_plane, query_first, key_first,
    scale_log2, keep_threshold, keep_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, gradient of the scores before scaling), both float32 [BLOCK_M, BLOCK_N]."""
    products = query_key_products(
        query, key, query_first, key_first, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL, BLOCK_M, BLOCK_N, MASKED, PRECISION
    )
    weights = softmax_weights(products, maximum, log_sum, scale_log2)
    weight_gradient = tl.dot(out_gradient, tl.trans(value), input_precision=PRECISION)
    dropped = weights
    if DROPOUT:
        row = query_first + tl.arange(0, BLOCK_M)
        keep = keep_tile(seed, noise_plane, row, key_first, keep_threshold, BLOCK_M, BLOCK_N)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
        weight_gradient = tl.where(keep, weight_gradient * keep_scale, 0.0)
    return dropped, weights * (weight_gradient - delta[:, None])


@triton.jit
def query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, out_gradient_ptr,  # as in the forward kernel
    stats_ptr,  # float32 [B * H, 2, N], as the forward kernel wrote it
    delta_ptr,  # float32 [B * H, N], written here for the other kernel: sum of out * out_gradient over channels
    query_gradient_ptr,  # [B, H, N, D], by stride
    seed_ptr,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    out_gradient_stride_b, out_gradient_stride_h, out_gradient_stride_n,
    query_gradient_stride_b, query_gradient_stride_h, query_gradient_stride_n,
    heads, scale, scale_log2, keep_threshold, keep_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PART: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head, over the key blocks."""
    N: tl.constexpr = HEIGHT * WIDTH
    QUERY_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    plane = tl.program_id(0) // QUERY_BLOCKS
    first = tl.program_id(0) % QUERY_BLOCKS * BLOCK_M
    batch, head = (plane // heads).to(tl.int64), plane % heads
    query_ptr += batch * query_stride_b + head * query_stride_h
    key_ptr += batch * key_stride_b + head * key_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    out_gradient_ptr += batch * out_gradient_stride_b + head * out_gradient_stride_h
    query_gradient_ptr += batch * query_gradient_stride_b + head * query_gradient_stride_h

    query = load_tokens(query_ptr, first, query_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
    out = load_tokens(out_ptr, first, out_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
    out_gradient = load_tokens(out_gradient_ptr, first, out_gradient_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
    token = first + tl.arange(0, BLOCK_M)
    row = plane.to(tl.int64) * N + token
    maximum, log_sum = load_stats(stats_ptr, plane, token, N)
    delta = tl.sum(out.to(tl.float32) * out_gradient.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=token < N)
    seed, noise_plane = tl.load(seed_ptr) if DROPOUT else 0, plane + noise_start(seed_ptr, PART)

    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = near_blocks(first, BLOCK_M, BLOCK_N, HEIGHT, WIDTH, RADIUS_ROW)
    FULL_BLOCKS: tl.constexpr = N // BLOCK_N
    for MASKED in tl.static_range(2):
        blocks = end - begin + (N % BLOCK_N != 0) if MASKED else FULL_BLOCKS - (end - begin)
        for step in range(0, blocks):
            key_first = block_at(step, begin, end, FULL_BLOCKS, MASKED) * BLOCK_N
            hidden = False
            if MASKED and SKIP:
                hidden = _wholly_hidden(first, BLOCK_M, key_first, BLOCK_N, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL)
            if not hidden:
                key = load_tokens(key_ptr, key_first, key_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
                value = load_tokens(value_ptr, key_first, value_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
                _, gradient = _score_gradient(
                    query, key, value, out_gradient, maximum, log_sum, delta, seed, noise_plane, first, key_first,
                    scale_log2, keep_threshold, keep_scale, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL,
                    BLOCK_M, BLOCK_N, MASKED, DROPOUT, PRECISION,
                )  # fmt: skip
                accumulator = tl.dot(gradient.to(key.dtype), key, accumulator, input_precision=PRECISION)
    store_tokens(query_gradient_ptr, accumulator * scale, first, query_gradient_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def key_value_gradient_kernel(
    query_ptr, key_ptr, value_ptr, out_gradient_ptr,
    stats_ptr, delta_ptr,  # float32 [B * H, 2, N] and [B * H, N]
    key_gradient_ptr, value_gradient_ptr,  # [B, H, N, D], by stride, both of the same
    seed_ptr,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    out_gradient_stride_b, out_gradient_stride_h, out_gradient_stride_n,
    key_gradient_stride_b, key_gradient_stride_h, key_gradient_stride_n,
    heads, scale, scale_log2, keep_threshold, keep_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PART: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one head, over the query blocks. The window is symmetric."""
    N: tl.constexpr = HEIGHT * WIDTH
    KEY_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    plane = tl.program_id(0) // KEY_BLOCKS
    first = tl.program_id(0) % KEY_BLOCKS * BLOCK_N
    batch, head = (plane // heads).to(tl.int64), plane % heads
    query_ptr += batch * query_stride_b + head * query_stride_h
    key_ptr += batch * key_stride_b + head * key_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    out_gradient_ptr += batch * out_gradient_stride_b + head * out_gradient_stride_h
    key_gradient_ptr += batch * key_gradient_stride_b + head * key_gradient_stride_h
    value_gradient_ptr += batch * key_gradient_stride_b + head * key_gradient_stride_h

    key = load_tokens(key_ptr, first, key_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
    value = load_tokens(value_ptr, first, value_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
    seed, noise_plane = tl.load(seed_ptr) if DROPOUT else 0, plane + noise_start(seed_ptr, PART)
    key_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin, end = near_blocks(first, BLOCK_N, BLOCK_M, HEIGHT, WIDTH, RADIUS_ROW)
    FULL_BLOCKS: tl.constexpr = N // BLOCK_M
    for MASKED in tl.static_range(2):
        blocks = end - begin + (N % BLOCK_M != 0) if MASKED else FULL_BLOCKS - (end - begin)
        for step in range(0, blocks):
            query_first = block_at(step, begin, end, FULL_BLOCKS, MASKED) * BLOCK_M
            hidden = False
            if MASKED and SKIP:
                hidden = _wholly_hidden(first, BLOCK_N, query_first, BLOCK_M, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL)
            if not hidden:
                query = load_tokens(query_ptr, query_first, query_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
                out_gradient = load_tokens(
                    out_gradient_ptr, query_first, out_gradient_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D
                )
                token = query_first + tl.arange(0, BLOCK_M)
                maximum, log_sum = load_stats(stats_ptr, plane, token, N)
                delta = tl.load(delta_ptr + plane.to(tl.int64) * N + token, mask=token < N, other=0.0)
                weights, gradient = _score_gradient(
                    query, key, value, out_gradient, maximum, log_sum, delta, seed, noise_plane, query_first, first,
                    scale_log2, keep_threshold, keep_scale, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL,
                    BLOCK_M, BLOCK_N, MASKED, DROPOUT, PRECISION,
                )  # fmt: skip
                value_accumulator = tl.dot(
                    tl.trans(weights.to(value.dtype)), out_gradient, value_accumulator, input_precision=PRECISION
                )
                key_accumulator = tl.dot(
                    tl.trans(gradient.to(key.dtype)), query, key_accumulator, input_precision=PRECISION
                )
    store_tokens(key_gradient_ptr, key_accumulator * scale, first, key_gradient_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tokens(value_gradient_ptr, value_accumulator, first, key_gradient_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
