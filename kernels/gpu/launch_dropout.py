"""Launches of the dropout kernels, as launch.py has them for the others."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..layout import ceil_div, contiguous, keep_threshold, summed_over_batch
from . import dropout as kernels

_ELEMENTS = 2048
_PROGRAMS = 256


def norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, eps: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) [R, C] and its mean and reciprocal deviation, float32 [R, 2].

    x [R, C]; residual [R', C], row r meets row r % R'; weight and bias float32 [C].
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = torch.empty(x.shape[0], 2, dtype=torch.float32, device=x.device)
    if out.numel() > 0:
        block = _block(x)
        with on(x.device):
            kernels.norm_forward_kernel[(ceil_div(x.shape[0], block["BLOCK_R"]),)](
                x_ptr=contiguous(x),
                residual_ptr=contiguous(residual),
                weight_ptr=contiguous(weight),
                bias_ptr=contiguous(bias),
                out_ptr=out,
                stats_ptr=stats,
                **seed_arguments(seed, stats),
                residual_rows=residual.shape[0],
                eps=eps,
                DROPOUT=dropout_p > 0,
                **block,
                **dropout_arguments(dropout_p),
            )
    return out, stats


def norm_backward(
    out_gradient: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    stats: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias, the last two in float32: rows of one tensor."""
    (rows, width), dropout = x.shape, dropout_p > 0
    # Two tensors even where they are equal, without dropout: whoever gets one may add to it in place.
    sum_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_gradient = torch.empty_like(sum_gradient)
    programs = max(1, min(_PROGRAMS, rows // 16))
    allocate = torch.empty if x.numel() > 0 else torch.zeros  # every program writes its part, one without rows too
    parts = allocate(programs, 2, width, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        block = _block(x)
        with on(x.device):
            kernels.norm_backward_kernel[(programs,)](
                out_gradient_ptr=contiguous(out_gradient),
                x_ptr=contiguous(x),
                residual_ptr=contiguous(residual),
                weight_ptr=contiguous(weight),
                stats_ptr=contiguous(stats),
                sum_gradient_ptr=sum_gradient,
                x_gradient_ptr=x_gradient,
                part_ptr=parts,
                **seed_arguments(seed, stats),
                residual_rows=residual.shape[0],
                rows_per_program=ceil_div(ceil_div(rows, programs), block["BLOCK_R"]) * block["BLOCK_R"],
                DROPOUT=dropout,
                **block,
                **dropout_arguments(dropout_p),
            )
    weight_and_bias = parts.sum(0)
    return x_gradient, summed_over_batch(sum_gradient, residual), weight_and_bias[0], weight_and_bias[1]


def dropout_forward(x: Tensor, dropout_p: float, relu: bool, seed: Tensor | None) -> Tensor:
    """dropout(x), or dropout(relu(x)), of x [R, C]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        block = _block(x)
        with on(x.device):
            kernels.dropout_forward_kernel[(ceil_div(x.shape[0], block["BLOCK_R"]),)](
                x_ptr=contiguous(x),
                out_ptr=out,
                **seed_arguments(seed, out),
                RELU=relu,
                DROPOUT=dropout_p > 0,
                **block,
                **dropout_arguments(dropout_p),
            )
    return out


def dropout_backward(out_gradient: Tensor, out: Tensor, dropout_p: float, relu: bool, seed: Tensor | None) -> Tensor:
    """Gradient of x, from what `dropout_forward` gave."""
    gradient = torch.empty_like(out, memory_format=torch.contiguous_format)
    if out.numel() > 0:
        block = _block(out)
        with on(out.device):
            kernels.dropout_backward_kernel[(ceil_div(out.shape[0], block["BLOCK_R"]),)](
                out_gradient_ptr=contiguous(out_gradient),
                out_ptr=contiguous(out),
                gradient_ptr=gradient,
                **seed_arguments(seed, gradient),
                RELU=relu,
                **block,
                **dropout_arguments(dropout_p),
            )
    return gradient


def rows_of_a_tile(width: int) -> int:
    """Rows of a program's tile: 16 elements a thread where they are no wider than 2,048."""
    return max(1, _ELEMENTS // max(16, triton.next_power_of_2(width)))


def warps_of_a_tile(width: int) -> int:
    """A row wider than a tile would spill from four warps' registers on Blackwell."""
    return 4 if width <= _ELEMENTS else 8


def _block(x: Tensor) -> dict[str, int]:
    rows, width = x.shape
    return {"rows": rows, **_tile(width)}


@lru_cache(maxsize=64)
def _tile(width: int) -> dict[str, int]:
    """Not to be written to."""
    columns = max(16, triton.next_power_of_2(width))
    return {
        "WIDTH": width,
        "BLOCK_R": rows_of_a_tile(width),
        "BLOCK_C": columns,
        "num_warps": warps_of_a_tile(width),
    }


def dropout_arguments(p: float) -> dict[str, float | int]:
    """What the kernels take for a probability."""
    return {"keep_threshold": keep_threshold(p), "keep_scale": 1 / (1 - p)}


def seed_arguments(seed: Tensor | None, instead: Tensor) -> dict[str, Tensor | bool]:
    """What the kernels take for a seed; `instead` is some pointer where there is none."""
    return {"seed_ptr": instead if seed is None else seed, "PART": seed is not None and seed.ndim == 1}


def on(device: torch.device) -> torch.cuda.device:
    """Launch on the tensors' device; nothing to do for a CPU, which Triton's interpreter runs on."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
