"""The forward pass of neighbour-masked attention with one program a head, for at most 256 tokens.

Keys and values are loaded once and serve every block of queries. A query meets all its keys at once, so its softmax
needs no running maximum; rows and columns of the keys are the same for all blocks and are divided out once. Which
chips and widths it serves, and what it saves, is in tiles.py and docs/design/gpu-kernels.md.
"""

import triton
import triton.language as tl

from .neighbor_masked_attention import load_tokens, query_key_products, store_stats, store_tokens
from .philox import keep_tile, noise_start


@triton.jit
def whole_sequence_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, stats_ptr, seed_ptr,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    heads, scale_log2, keep_threshold, keep_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS_ROW: tl.constexpr, RADIUS_COL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Arguments as of `neighbor_masked_attention.forward_kernel`; BLOCK_N holds all keys, the grid is [B * H]."""
    N: tl.constexpr = HEIGHT * WIDTH
    plane = tl.program_id(0)
    batch, head = (plane // heads).to(tl.int64), plane % heads
    query_ptr += batch * query_stride_b + head * query_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    start = plane * 0
    key = load_tokens(
        key_ptr + batch * key_stride_b + head * key_stride_h, start, key_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    value = load_tokens(
        value_ptr + batch * value_stride_b + head * value_stride_h, start, value_stride_n, N, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    seed, noise_plane = tl.load(seed_ptr) if DROPOUT else 0, plane + noise_start(seed_ptr, PART)
    for block in range(0, (N + BLOCK_M - 1) // BLOCK_M):
        first = block * BLOCK_M
        query = load_tokens(query_ptr, first, query_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
        products = query_key_products(
            query, key, first, start, HEIGHT, WIDTH, RADIUS_ROW, RADIUS_COL, BLOCK_M, BLOCK_N, True, PRECISION
        )
        maximum = tl.max(products, axis=1)
        pivot = tl.where(maximum == float("-inf"), 0.0, maximum)
        weights = tl.exp2((products - pivot[:, None]) * scale_log2)
        total = tl.sum(weights, axis=1)
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        token = first + tl.arange(0, BLOCK_M)
        # Stored before the noise is drawn, which needs the registers.
        store_stats(stats_ptr, maximum, total, empty, plane, token, N)
        if DROPOUT:
            if N < BLOCK_N:
                # Read again each time: twenty round keys, computed once from it, would stay in registers. Where all
                # keys are there, the compiler does better with them.
                seed = tl.load(seed_ptr, volatile=True)
            keep = keep_tile(seed, noise_plane, token, start, keep_threshold, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        out = tl.dot(weights.to(value.dtype), value, input_precision=PRECISION) * (keep_scale / total)[:, None]
        out = tl.where(empty[:, None], 0.0, out)  # whatever the values are
        store_tokens(out_ptr, out, first, out_stride_n, N, HEAD_DIM, BLOCK_M, BLOCK_D)
