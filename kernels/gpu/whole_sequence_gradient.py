"""The backward pass of neighbour-masked attention with one program a head, for at most 256 tokens.

Two kernels, one for queries and one for keys, compute scores, weights and noise twice, seven matrix products in all.
A program that has the whole head needs five and everything else once: it walks over blocks of keys, whose gradients it
holds while it walks over blocks of queries, and holds the gradients of all queries throughout. Which chips and widths
it serves, and what it saves, is in tiles.py and docs/design/gpu-kernels.md.
"""

import triton
import triton.language as tl

from .neighbor_masked_attention import (
    block_at,
    load_stats,
    load_tokens,
    near_blocks,
    query_key_products,
    softmax_weights,
    store_tokens,
)
from .philox import keep_tile, noise_start


@triton.jit
def whole_sequence_gradient_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, out_gradient_ptr, stats_ptr,
    delta_ptr,  # float32 [B * H, N], scratch: sum of out * out_gradient over channels, over keep_scale
    query_gradient_ptr, key_gradient_ptr, value_gradient_ptr,
    seed_ptr,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    out_gradient_stride_b, out_gradient_stride_h, out_gradient_stride_n,
    query_gradient_stride_b, query_gradient_stride_h, query_gradient_stride_n,
    key_gradient_stride_b, key_gradient_stride_h, key_gradient_stride_n,
    heads, scale, scale_log2, keep_threshold, keep_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Arguments as of the kernels in `neighbor_masked_attention`; four BLOCK_M hold all queries, the grid is [B * H].

    What dropout scales kept weights by is left out of everything and put on each gradient at its end.
    """
    N: tl.constexpr = HEIGHT * WIDTH
    FULL_BLOCKS: tl.constexpr = N // BLOCK_M
    plane = tl.program_id(0)
    batch, head = (plane // heads).to(tl.int64), plane % heads
    query_ptr += batch * query_stride_b + head * query_stride_h
    key_ptr += batch * key_stride_b + head * key_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    out_gradient_ptr += batch * out_gradient_stride_b + head * out_gradient_stride_h
    query_gradient_ptr += batch * query_gradient_stride_b + head * query_gradient_stride_h
    key_gradient_ptr += batch * key_gradient_stride_b + head * key_gradient_stride_h
    value_gradient_ptr += batch * key_gradient_stride_b + head * key_gradient_stride_h
    delta_ptr += plane.to(tl.int64) * N
    noise_plane = plane + noise_start(seed_ptr, PART)

    for block in range(0, (N + BLOCK_M - 1) // BLOCK_M):
        first = block * BLOCK_M
        token = first + tl.arange(0, BLOCK_M)
        out = load_tokens(out_ptr, first, out_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
        out_gradient = load_tokens(out_gradient_ptr, first, out_gradient_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * out_gradient.to(tl.float32), axis=1) / keep_scale
        tl.store(delta_ptr + token, delta, mask=token < N)
    tl.debug_barrier()  # other threads of the program read them

    query_0 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # gradients of the queries of each block
    query_1, query_2, query_3 = query_0, query_0, query_0
    for key_block in range(0, (N + BLOCK_N - 1) // BLOCK_N):
        first = key_block * BLOCK_N
        key = load_tokens(key_ptr, first, key_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
        value = load_tokens(value_ptr, first, value_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
        key_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        value_accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        begin, end = near_blocks(first, BLOCK_N, BLOCK_M, HEIGHT, WIDTH, RADIUS_ROW)
        for MASKED in tl.static_range(2):
            blocks = end - begin + (N % BLOCK_M != 0) if MASKED else FULL_BLOCKS - (end - begin)
            for step in range(0, blocks):
                block = block_at(step, begin, end, FULL_BLOCKS, MASKED)
                query_first = block * BLOCK_M
                token = query_first + tl.arange(0, BLOCK_M)
                query = load_tokens(query_ptr, query_first, query_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
                out_gradient = load_tokens(
                    out_gradient_ptr, query_first, out_gradient_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D
                )
                maximum, log_sum = load_stats(stats_ptr, plane, token, N)
                delta = tl.load(delta_ptr + token, mask=token < N, other=0.0)
                products = query_key_products(
                    query, key, query_first, first, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL,
                    BLOCK_M, BLOCK_N, MASKED, PRECISION,
                )  # fmt: skip
                weights = softmax_weights(products, maximum, log_sum, scale_log2)
                weight_gradient = tl.dot(out_gradient, tl.trans(value), input_precision=PRECISION)
                dropped = weights
                if DROPOUT:
                    # Read again each time: twenty round keys, computed once from it, would stay in registers.
                    seed = tl.load(seed_ptr, volatile=True)
                    keep = keep_tile(seed, noise_plane, token, first, keep_threshold, BLOCK_M, BLOCK_N)
                    dropped = tl.where(keep, weights, 0.0)
                    weight_gradient = tl.where(keep, weight_gradient, 0.0)
                value_accumulator = tl.dot(
                    tl.trans(dropped.to(value.dtype)), out_gradient, value_accumulator, input_precision=PRECISION
                )
                gradient = (weights * (weight_gradient - delta[:, None])).to(key.dtype)
                key_accumulator = tl.dot(tl.trans(gradient), query, key_accumulator, input_precision=PRECISION)
                part = tl.dot(gradient, key, input_precision=PRECISION)
                # Registers have no index: the block's own are found by branches, which all threads take alike.
                if block == 0:
                    query_0 += part
                if N > BLOCK_M:  # noqa: SIM102, one is known to the compiler and one is not
                    if block == 1:
                        query_1 += part
                if N > 2 * BLOCK_M:  # noqa: SIM102, one is known to the compiler and one is not
                    if block == 2:
                        query_2 += part
                if N > 3 * BLOCK_M:  # noqa: SIM102, one is known to the compiler and one is not
                    if block == 3:
                        query_3 += part
        value_gradient, key_gradient = value_accumulator * keep_scale, key_accumulator * (scale * keep_scale)
        store_tokens(value_gradient_ptr, value_gradient, first, key_gradient_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)
        store_tokens(key_gradient_ptr, key_gradient, first, key_gradient_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D)

    first = plane * 0
    for BLOCK in tl.static_range((N + BLOCK_M - 1) // BLOCK_M):
        part = query_0 if BLOCK == 0 else query_1 if BLOCK == 1 else query_2 if BLOCK == 2 else query_3
        store_tokens(
            query_gradient_ptr, part * (scale * keep_scale), first + BLOCK * BLOCK_M,
            query_gradient_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip
