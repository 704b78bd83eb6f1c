"""From tensors to kernel launches: allocate, choose the tiles, compute the grid. No mathematics, no checks of users.

Tiles are literal lists with a reason each; `attention_config` picks by what decides: the bytes of an element and the
width of a head. Nothing is tuned at run time, so nothing has to be cached or can differ between two runs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from . import neighbor_masked_attention as attention


@dataclass(frozen=True)
class TileConfig:
    """Tile of a kernel: BLOCK_M queries (or tokens) by BLOCK_N keys (or outputs), warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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


def attention_config(table: dict[tuple[int, int], TileConfig], element_size: int, head_dim: int) -> TileConfig:
    """The tile for elements of that many bytes and heads of that width."""
    return table[element_size, 64 if head_dim <= 64 else 128]


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, D], base-2 log-sum-exp float32 [B * H, N]) of query [B or 1, H, N, D], key and value [B, H, N, D]."""
    batch, heads, tokens, head_dim = key.shape
    out = _like_tokens_first(key)
    log_sum_exp = torch.empty(batch * heads, tokens, dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out, log_sum_exp
    config = config or attention_config(FORWARD, key.element_size(), head_dim)
    query, key, value = (_unit_last_stride(t) for t in (query, key, value))
    with _on(key.device):
        attention.forward_kernel[(batch * heads * triton.cdiv(tokens, config.block_m),)](
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            out_ptr=out,
            log_sum_exp_ptr=log_sum_exp,
            seed_ptr=log_sum_exp if seed is None else seed,
            **_strides(query=query.expand_as(key), key=key, value=value, out=out),
            heads=heads,
            scale_log2=scale * math.log2(math.e),
            **_dropout(dropout_p),
            **_geometry(height, width, radius_row, radius_col, head_dim, config, transposed=False),
            DROPOUT=dropout_p > 0,
            PRECISION=dot_precision(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, log_sum_exp


def attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. A query of batch 1 gets one part an element of the batch, summed here."""
    batch, heads, tokens, head_dim = key.shape
    broadcast = query.shape[0] != batch
    key_gradient, value_gradient = _like_tokens_first(key), _like_tokens_first(key)
    # Parts are summed in float32, in torch's fixed order.
    query_gradient = _like_tokens_first(key, torch.float32 if broadcast else key.dtype)
    if key.numel() > 0:
        config = config or attention_config(BACKWARD, key.element_size(), head_dim)
        delta = torch.empty_like(log_sum_exp)
        tensors = {"query": query, "key": key, "value": value, "out": out, "out_gradient": out_gradient}
        tensors = {name: _unit_last_stride(t) for name, t in tensors.items()}
        shared = {
            "log_sum_exp_ptr": log_sum_exp,
            "delta_ptr": delta,
            "seed_ptr": log_sum_exp if seed is None else seed,
            "heads": heads,
            "scale": scale,
            "scale_log2": scale * math.log2(math.e),
            **_dropout(dropout_p),
            "DROPOUT": dropout_p > 0,
            "PRECISION": dot_precision(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        with _on(key.device):
            ours = tensors | {"query_gradient": query_gradient}
            attention.query_gradient_kernel[(batch * heads * triton.cdiv(tokens, config.block_m),)](
                **{f"{name}_ptr": t for name, t in ours.items()},
                **_strides(**{name: t.expand_as(key) for name, t in ours.items()}),
                **shared,
                **_geometry(height, width, radius_row, radius_col, head_dim, config, transposed=False),
            )
            del tensors["out"]
            attention.key_value_gradient_kernel[(batch * heads * triton.cdiv(tokens, config.block_n),)](
                **{f"{name}_ptr": t for name, t in tensors.items()},
                key_gradient_ptr=key_gradient,
                value_gradient_ptr=value_gradient,
                **_strides(**{name: t.expand_as(key) for name, t in tensors.items()}, key_gradient=key_gradient),
                **shared,
                **_geometry(height, width, radius_row, radius_col, head_dim, config, transposed=True),
            )
    if broadcast:
        query_gradient = query_gradient.sum(0, keepdim=True).to(query.dtype)
    return query_gradient, key_gradient, value_gradient


def dot_precision() -> str:
    """How float32 dots are done: exactly, unless the user allows TF32 by torch's own switch."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@lru_cache(maxsize=256)
def any_block_hidden(
    height: int, width: int, radius_row: int, radius_col: int, block: int, other: int
) -> bool:
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


def _geometry(
    height: int, width: int, radius_row: int, radius_col: int, head_dim: int, config: TileConfig, transposed: bool
) -> dict[str, int | bool]:
    own, other = (config.block_n, config.block_m) if transposed else (config.block_m, config.block_n)
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "RADIUS_ROW": radius_row,
        "RADIUS_COL": radius_col,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SKIP": any_block_hidden(height, width, radius_row, radius_col, own, other),
    }


def _dropout(p: float) -> dict[str, float | int]:
    return {"keep_threshold": round(p * 65536), "keep_scale": 1 / (1 - p)}


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_stride_{axis}": tensor.stride(dim)
        for name, tensor in tensors.items()
        for dim, axis in enumerate(("b", "h", "n"))
    }


def _like_tokens_first(key: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty [B, H, N, D] laid out as [B, N, H, D]: merging the heads for the output projection is then a view."""
    batch, heads, tokens, head_dim = key.shape
    storage = torch.empty(batch, tokens, heads, head_dim, dtype=dtype or key.dtype, device=key.device)
    return storage.transpose(1, 2)


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _on(device: torch.device) -> torch.cuda.device:
    """Launch on the tensors' device; nothing to do for a CPU, which Triton's interpreter runs on."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
