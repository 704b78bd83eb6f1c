"""The passes between a transformer's products, in Triton: dropout, add and LayerNorm in one, ReLU and dropout in one.

Rows are tokens, [R, C] contiguous. The noise of element (row, col) is stream KEEP's of plane 0, redrawn in the backward
pass. A program owns BLOCK_R rows, whole ones, so BLOCK_C >= C is a power of two.
"""

import triton
import triton.language as tl

from .philox import keep_tile, noise_start


@triton.jit
def _offsets(row, rows, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    col = tl.arange(0, BLOCK_C)
    return row.to(tl.int64)[:, None] * WIDTH + col[None, :], (row < rows)[:, None] & (col < WIDTH)[None, :]


@triton.jit
def _dropped(
    value, seed, row, keep_threshold, keep_scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr
):
    if DROPOUT:
        value = tl.where(keep_tile(seed, 0, row, 0, keep_threshold, BLOCK_R, BLOCK_C), value * keep_scale, 0.0)
    return value


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr,  # [R, C]; [residual_rows, C], row r meets row r % residual_rows
    weight_ptr, bias_ptr,  # float32 [C]
    out_ptr,  # [R, C]
    stats_ptr,  # float32 [R, 2]: mean and reciprocal deviation
    seed_ptr,  # int64 [], or [2] of a PART of the rows
    rows, residual_rows, eps, keep_threshold, keep_scale,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """LayerNorm(residual + dropout(x)) of BLOCK_R rows."""
    row, col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offsets, mask = _offsets(row, rows, WIDTH, BLOCK_C)
    residual_offsets, _ = _offsets(row % residual_rows, rows, WIDTH, BLOCK_C)
    seed, start = tl.load(seed_ptr) if DROPOUT else 0, noise_start(seed_ptr, PART)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(tl.float32)
    z += _dropped(x, seed, start + row, keep_threshold, keep_scale, BLOCK_R, BLOCK_C, DROPOUT)
    mean = tl.sum(tl.where(mask, z, 0.0), axis=1) / WIDTH
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0)
    bias = tl.load(bias_ptr + col, mask=col < WIDTH, other=0.0)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + 2 * row, mean, mask=row < rows)
    tl.store(stats_ptr + 2 * row + 1, rstd, mask=row < rows)


@triton.jit
def norm_backward_kernel(
    out_gradient_ptr, x_ptr, residual_ptr,  # as in the forward kernel
    weight_ptr,  # float32 [C]
    stats_ptr,  # float32 [R, 2]
    sum_gradient_ptr, x_gradient_ptr,  # [R, C]: of residual + dropout(x), which is the residual's, and of x
    part_ptr,  # float32 [programs, 2, C]: gradients of weight and bias, summed over a program's rows
    seed_ptr,
    rows, residual_rows, rows_per_program, keep_threshold, keep_scale,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Gradients of rows_per_program rows, BLOCK_R at a time."""
    col = tl.arange(0, BLOCK_C)
    seed, start = tl.load(seed_ptr) if DROPOUT else 0, noise_start(seed_ptr, PART)
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0)
    weight_sum, bias_sum = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    begin = tl.program_id(0) * rows_per_program
    for first in range(begin, tl.minimum(begin + rows_per_program, rows), BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        offsets, mask = _offsets(row, rows, WIDTH, BLOCK_C)
        residual_offsets, _ = _offsets(row % residual_rows, rows, WIDTH, BLOCK_C)
        mean = tl.load(stats_ptr + 2 * row, mask=row < rows, other=0.0)
        rstd = tl.load(stats_ptr + 2 * row + 1, mask=row < rows, other=0.0)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(tl.float32)
        z += _dropped(x, seed, start + row, keep_threshold, keep_scale, BLOCK_R, BLOCK_C, DROPOUT)
        normed = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
        gradient = tl.load(out_gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        weight_sum += tl.sum(gradient * normed, axis=0)
        bias_sum += tl.sum(gradient, axis=0)
        scaled = gradient * weight[None, :]
        slope, offset = tl.sum(scaled * normed, axis=1) / WIDTH, tl.sum(scaled, axis=1) / WIDTH
        down = (scaled - offset[:, None] - normed * slope[:, None]) * rstd[:, None]
        tl.store(sum_gradient_ptr + offsets, down.to(sum_gradient_ptr.dtype.element_ty), mask=mask)
        down = _dropped(down, seed, start + row, keep_threshold, keep_scale, BLOCK_R, BLOCK_C, DROPOUT)
        tl.store(x_gradient_ptr + offsets, down.to(x_gradient_ptr.dtype.element_ty), mask=mask)
    part_ptr += tl.program_id(0) * 2 * WIDTH
    tl.store(part_ptr + col, weight_sum, mask=col < WIDTH)
    tl.store(part_ptr + WIDTH + col, bias_sum, mask=col < WIDTH)


@triton.jit
def dropout_forward_kernel(
    x_ptr, out_ptr, seed_ptr, rows, keep_threshold, keep_scale,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """dropout(x), or dropout(relu(x)), of BLOCK_R rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offsets, mask = _offsets(row, rows, WIDTH, BLOCK_C)
    seed, start = tl.load(seed_ptr) if DROPOUT else 0, noise_start(seed_ptr, PART)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # a NaN goes through
    out = _dropped(x, seed, start + row, keep_threshold, keep_scale, BLOCK_R, BLOCK_C, DROPOUT)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dropout_backward_kernel(
    out_gradient_ptr, out_ptr, gradient_ptr, seed_ptr, rows, keep_threshold, keep_scale,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, RELU: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """With ReLU, an output above 0 says that its input was and that it was kept: nothing is redrawn."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offsets, mask = _offsets(row, rows, WIDTH, BLOCK_C)
    gradient = tl.load(out_gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        out = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.where(out > 0, gradient * keep_scale, 0.0)
    else:
        seed, start = tl.load(seed_ptr), noise_start(seed_ptr, PART)
        gradient = _dropped(gradient, seed, start + row, keep_threshold, keep_scale, BLOCK_R, BLOCK_C, True)
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
