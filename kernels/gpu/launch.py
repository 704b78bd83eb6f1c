"""From tensors to kernel launches: allocate, choose the tiles, compute the grid. No mathematics, no checks of users."""

import math
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor

from ..layout import NOWHERE, Into, Window, ceil_div, contiguous, jitter_threshold, like_tokens_first, unit_last_stride
from . import jitter_project as jitter
from . import neighbor_masked_attention as attention
from .launch_dropout import (
    dropout_arguments,
    dropout_backward,
    dropout_forward,
    norm_backward,
    norm_forward,
    on,
    seed_arguments,
)
from .tiles import (
    JITTER,
    TileConfig,
    attention_tile,
    chip_of,
    dot_precision,
    skipping_pays,
    whole_sequence_gradient_tile,
    whole_sequence_tile,
)
from .whole_sequence_attention import whole_sequence_kernel
from .whole_sequence_gradient import whole_sequence_gradient_kernel

__all__ = [
    "INTERPRETED",
    "attention_backward",
    "attention_backward_into",
    "attention_forward",
    "dropout_backward",
    "dropout_forward",
    "jitter_backward",
    "jitter_forward",
    "norm_backward",
    "norm_forward",
]

INTERPRETED = not isinstance(attention.forward_kernel, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on CPU tensors."""

_PROGRAMS = 256
_FURTHEST = (2**31 - 1) // 256
"""Elements between a token and the next, at most: no tile has more than 256 tokens."""


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, window: Window, dropout_p: float, scale: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out [B, H, N, D] and the softmax's stats, float32 [B * H, 2, N]: largest product, base-2 log of the sum.

    query [B or 1, H, N, D], key and value [B, H, N, D].
    """
    batch, heads, tokens, head_dim = key.shape
    out = like_tokens_first(key)
    stats = torch.empty(batch * heads, 2, tokens, dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out, stats
    chip = chip_of(key.device)
    whole = whole_sequence_tile(tokens, key.element_size(), head_dim, min(window[2:]) >= 0, chip)
    tile = whole or attention_tile("forward_kernel", key.element_size(), head_dim, chip)
    query, key, value = (_readable(t) for t in (query, key, value))
    geometry = _geometry(window, head_dim, tile, transposed=False)
    kernel, programs = attention.forward_kernel, batch * heads * ceil_div(tokens, tile.block_m)
    if tile.whole:
        kernel, programs = whole_sequence_kernel, batch * heads
        del geometry["SKIP"]  # nothing is skipped where all keys are one block
    with on(key.device):
        kernel[(programs,)](
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            out_ptr=out,
            stats_ptr=stats,
            **seed_arguments(seed, stats),
            **_strides(query=query.expand_as(key), key=key, value=value, out=out),
            heads=heads,
            scale_log2=scale * math.log2(math.e),
            **dropout_arguments(dropout_p),
            **geometry,
            DROPOUT=dropout_p > 0,
        )
    return out, stats


def attention_backward(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    window: Window, dropout_p: float, scale: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value. A query of batch 1 gets one part an element of the batch, summed here."""
    arguments = (out_gradient, query, key, value, out, stats, window, dropout_p, scale, seed)
    return attention_backward_into(*arguments, NOWHERE)


def attention_backward_into(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    window: Window, dropout_p: float, scale: float, seed: Tensor | None, into: Into,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `attention_backward`, into memory of the caller's."""
    batch, heads, tokens, head_dim = key.shape
    broadcast = query.shape[0] != batch
    key_gradient, value_gradient = (like_tokens_first(key) if t is None else t for t in into[1:])
    # Parts are summed in float32, in torch's fixed order.
    query_gradient = like_tokens_first(key, torch.float32 if broadcast else key.dtype) if into[0] is None else into[0]
    if key.numel() > 0:
        tensors = {"query": query, "key": key, "value": value, "out": out, "out_gradient": out_gradient}
        tensors = {name: _readable(t) for name, t in tensors.items()}
        stats = contiguous(stats)
        shared = {
            "stats_ptr": stats,
            "delta_ptr": torch.empty(batch * heads, tokens, dtype=torch.float32, device=key.device),
            **seed_arguments(seed, stats),
            "heads": heads,
            "scale": scale,
            "scale_log2": scale * math.log2(math.e),
            **dropout_arguments(dropout_p),
            "DROPOUT": dropout_p > 0,
        }
        whole = whole_sequence_gradient_tile(tokens, key.element_size(), head_dim, chip_of(key.device))
        if not _aligned(*tensors.values()):
            whole = None  # an address an element, or one of 64 bits: what it holds on the chip would spill
        launch = partial(_whole_backward, whole) if whole else _blockwise_backward
        with on(key.device):
            launch(tensors, query_gradient, key_gradient, value_gradient, shared, window)
    if broadcast:
        query_gradient = query_gradient.sum(0, keepdim=True).to(query.dtype)
    return query_gradient, key_gradient, value_gradient


def _whole_backward(
    tile: TileConfig, tensors: dict[str, Tensor], query_gradient: Tensor, key_gradient: Tensor, value_gradient: Tensor,
    shared: dict, window: Window,
) -> None:  # fmt: skip
    """All gradients by one kernel, a program a head."""
    batch, heads, _, head_dim = key_gradient.shape
    ours = tensors | {"query_gradient": query_gradient, "key_gradient": key_gradient}
    geometry = _geometry(window, head_dim, tile, transposed=True)
    del geometry["SKIP"]  # too few blocks for it to pay
    whole_sequence_gradient_kernel[(batch * heads,)](
        **{f"{name}_ptr": t for name, t in ours.items()},
        value_gradient_ptr=value_gradient,
        **_strides(**{name: t.expand_as(key_gradient) for name, t in ours.items()}),
        **shared,
        **geometry,
    )


def _blockwise_backward(
    tensors: dict[str, Tensor], query_gradient: Tensor, key_gradient: Tensor, value_gradient: Tensor,
    shared: dict, window: Window,
) -> None:  # fmt: skip
    """Gradients of queries, with delta, by one kernel, then those of keys and values by another."""
    key = tensors["key"]
    batch, heads, tokens, head_dim = key.shape
    chip = chip_of(key.device)
    query_tile = attention_tile("query_gradient_kernel", key.element_size(), head_dim, chip)
    key_tile = attention_tile("key_value_gradient_kernel", key.element_size(), head_dim, chip)
    ours = tensors | {"query_gradient": query_gradient}
    attention.query_gradient_kernel[(batch * heads * ceil_div(tokens, query_tile.block_m),)](
        **{f"{name}_ptr": t for name, t in ours.items()},
        **_strides(**{name: t.expand_as(key) for name, t in ours.items()}),
        **shared,
        **_geometry(window, head_dim, query_tile, transposed=False),
    )
    ours = {name: t for name, t in tensors.items() if name != "out"} | {"key_gradient": key_gradient}
    attention.key_value_gradient_kernel[(batch * heads * ceil_div(tokens, key_tile.block_n),)](
        **{f"{name}_ptr": t for name, t in ours.items()},
        value_gradient_ptr=value_gradient,
        **_strides(**{name: t.expand_as(key) for name, t in ours.items()}),
        **shared,
        **_geometry(window, head_dim, key_tile, transposed=True),
    )


def jitter_forward(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, scale: float, prob: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Out [T, O] and the deviation of each token's noise, float32 [T], of tokens [T, C], weight [O, C], bias [O]."""
    count, channels = tokens.shape
    out = tokens.new_empty(count, weight.shape[0])
    deviation = torch.empty(count, dtype=torch.float32, device=tokens.device)
    if out.numel() == 0:
        return out, deviation
    tile = JITTER["forward", tokens.element_size()]
    with on(tokens.device):
        jitter.forward_kernel[(ceil_div(count, tile.block_m) * ceil_div(weight.shape[0], tile.block_n),)](
            token_ptr=contiguous(tokens),
            weight_ptr=contiguous(weight),
            bias_ptr=out if bias is None else contiguous(bias),
            out_ptr=out,
            deviation_ptr=deviation,
            **seed_arguments(seed, out),
            **_jitter_arguments(tokens, weight, scale, prob, tile),
            BIAS=bias is not None,
        )
    return out, deviation


def jitter_backward(
    out_gradient: Tensor,
    tokens: Tensor,
    weight: Tensor,
    deviation: Tensor,
    scale: float,
    prob: float,
    with_tokens: bool,
    with_bias: bool,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias, the last two of one tensor; those not asked for are empty."""
    (count, channels), outs = tokens.shape, weight.shape[0]
    out_gradient, tokens, weight, deviation = (contiguous(t) for t in (out_gradient, tokens, weight, deviation))
    tile = JITTER["weight", tokens.element_size()]
    tiles = ceil_div(outs, tile.block_n) * ceil_div(channels, tile.block_k)
    # As many splits as keep a large GPU busy, each summed by one program and all of them in torch's fixed order.
    splits = max(1, min(ceil_div(count, 4 * tile.block_m), ceil_div(_PROGRAMS, tiles)))
    # A split's part is the weight's, then the bias's.
    size = outs * channels
    allocate = torch.empty if count and size else torch.zeros
    parts = allocate(splits, size + outs * with_bias, dtype=torch.float32, device=tokens.device)
    token_gradient = torch.empty_like(tokens) if with_tokens else tokens.new_empty(0)
    if count and size:
        with on(tokens.device):
            arguments = _jitter_arguments(tokens, weight, scale, prob, tile)
            for name in ("scale_by_channels", "prob_threshold", "SOME"):
                del arguments[name]
            jitter.weight_gradient_kernel[(splits * tiles,)](
                token_ptr=tokens,
                out_gradient_ptr=out_gradient,
                deviation_ptr=deviation,
                part_ptr=parts,
                **seed_arguments(seed, parts),
                tokens_per_split=ceil_div(ceil_div(count, splits), tile.block_m) * tile.block_m,
                BIAS=with_bias,
                **arguments,
            )
            if with_tokens:
                tile = JITTER["tokens", tokens.element_size()]
                jitter.token_gradient_kernel[(ceil_div(count, tile.block_m),)](
                    token_ptr=tokens,
                    weight_ptr=weight,
                    out_gradient_ptr=out_gradient,
                    token_gradient_ptr=token_gradient,
                    **seed_arguments(seed, parts),
                    **_jitter_arguments(tokens, weight, scale, prob, tile),
                )
    gradient = parts.sum(0).to(weight.dtype)
    return token_gradient, gradient[:size].view(outs, channels), gradient[size:]


def _jitter_arguments(tokens: Tensor, weight: Tensor, scale: float, prob: float, tile: TileConfig) -> dict:
    return {
        "tokens": tokens.shape[0],
        "scale_by_channels": scale / tokens.shape[1],
        "prob_threshold": jitter_threshold(prob),
        "CHANNELS": tokens.shape[1],
        "OUT": weight.shape[0],
        "BLOCK_T": tile.block_m,
        "BLOCK_O": tile.block_n,
        "BLOCK_C": tile.block_k,
        "SOME": prob < 1,
        "PRECISION": dot_precision(tile),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _geometry(window: Window, head_dim: int, tile: TileConfig, transposed: bool) -> dict[str, int | bool | str]:
    return _fixed_geometry(tuple(window), head_dim, tile, transposed) | {"PRECISION": dot_precision(tile)}


@lru_cache(maxsize=256)
def _fixed_geometry(
    window: tuple[int, ...], head_dim: int, tile: TileConfig, transposed: bool
) -> dict[str, int | bool | str]:
    """What no switch of torch's changes; not to be written to."""
    height, width, radius_row, radius_col = window
    own, other = (tile.block_n, tile.block_m) if transposed else (tile.block_m, tile.block_n)
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "RADIUS_ROW": radius_row,
        "RADIUS_COL": radius_col,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SKIP": skipping_pays(height, width, radius_row, radius_col, own, other),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_stride_{axis}": tensor.stride(dim)
        for name, tensor in tensors.items()
        for dim, axis in enumerate(("b", "h", "n"))
    }


def _readable(tensor: Tensor) -> Tensor:
    """With unit last stride, and tokens near enough for a tile's offsets, which are numbers of 32 bits."""
    tensor = unit_last_stride(tensor)
    return tensor if tensor.stride(2) <= _FURTHEST else tensor.clone(memory_format=torch.contiguous_format)


def _aligned(*tensors: Tensor) -> bool:
    """Whether Triton finds by looking that memory may be read 16 elements at a time, by strides of 32 bits."""
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    return all(t.data_ptr() % 16 == 0 for t in tensors) and all(s % 16 == 0 and s < 2**31 for s in strides)
