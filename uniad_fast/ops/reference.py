"""The definition of every op in plain PyTorch: materialised, readable, any device, float64 too.

Halves are computed in float32 and rounded once at the end. B batch, N = height * width tokens.
"""

import math

import torch
from torch import Tensor

from .geometry import Window, hidden_keys
from .noise import jitter_normals, jittered_tokens, keep_mask


def neighbor_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, dropout_p: float, scale: float,
    seed: int | Tensor | None,
) -> Tensor:  # fmt: skip
    """softmax(scale * Q K^T, neighbours hidden) V (paper, section 3.2, NMA).

    query [B or 1, heads, N, head_dim], key and value [B, heads, N, head_dim] -> [B, heads, N, head_dim].
    """
    batch, heads, tokens, _ = key.shape
    q, k, v = (_at_least_float32(t) for t in (query, key, value))
    hidden = hidden_keys(window, query.device)

    scores = scale * (q @ k.transpose(-2, -1))  # [B, heads, N, N]
    scores = scores.masked_fill(hidden, float("-inf"))
    # A query with no key has a row of -inf; a finite pivot turns its exponentials into exact zeros.
    pivot = scores.amax(dim=-1, keepdim=True).detach().clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - pivot)
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    weights = weights.expand(batch, heads, tokens, tokens)
    if dropout_p > 0:
        assert seed is not None
        keep = keep_mask(seed, (batch * heads, tokens, tokens), dropout_p, query.device)
        weights = weights * keep.view_as(weights) / (1 - dropout_p)
    # Without a key the output is 0, whatever the values are: 0 * inf would be NaN.
    return (weights @ v).masked_fill(total == 0, 0).to(query.dtype)


def jitter_project(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    prob: float,
    seed: int | Tensor,
) -> Tensor:
    """linear(tokens + noise), noise ~ N(0, (scale * ||token||_2 / C_in)^2) (paper, section 3.2, FJ).

    tokens [..., C_in], weight [C_out, C_in], bias [C_out] -> [..., C_out].
    """
    channels = tokens.shape[-1]
    flat = _at_least_float32(tokens).reshape(math.prod(tokens.shape[:-1]), channels)
    normals = jitter_normals(seed, (flat.shape[0], channels), flat.dtype, flat.device)
    jittered = jittered_tokens(seed, flat.shape[0], prob, flat.device)
    deviation = scale / channels * torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    noisy = flat + deviation * normals * jittered[:, None]
    out = torch.nn.functional.linear(
        noisy, _at_least_float32(weight), None if bias is None else _at_least_float32(bias)
    )
    return out.view(*tokens.shape[:-1], weight.shape[0]).to(tokens.dtype)


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    eps: float,
    seed: int | Tensor | None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)); x [..., C], residual of its shape or broadcast over its first axes."""
    wide = _at_least_float32(residual) + _dropped(_at_least_float32(x), dropout_p, seed)
    out = torch.nn.functional.layer_norm(
        wide, (x.shape[-1],), _at_least_float32(weight).to(wide), _at_least_float32(bias).to(wide), eps
    )
    return out.to(x.dtype)


def dropout(x: Tensor, dropout_p: float, relu: bool, seed: int | Tensor | None) -> Tensor:
    """dropout(x), or dropout(relu(x)); x [..., C]."""
    return _dropped(_at_least_float32(x.relu() if relu else x), dropout_p, seed).to(x.dtype)


def _dropped(x: Tensor, dropout_p: float, seed: int | Tensor | None) -> Tensor:
    """Stream KEEP: plane 0, a row a token, a column a channel."""
    if dropout_p == 0:
        return x
    assert seed is not None
    rows = math.prod(x.shape[:-1])
    keep = keep_mask(seed, (1, rows, x.shape[-1]), dropout_p, x.device, part_axis=1)
    return x * keep.view(x.shape) / (1 - dropout_p)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
