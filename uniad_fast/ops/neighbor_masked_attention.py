"""Attention in which a token does not see its 2D neighbours: the public op, its gradient, its operators.

impl, of every op of the package:
    None         the best for the tensors' device
    "reference"  the definition: plain PyTorch, materialised, any device, float64 too
    "torch"      stock PyTorch: scaled_dot_product_attention with a cached dense mask
    "cpu"        C++ kernels, compiled for this processor by the first call
    "triton"     fused Triton kernels, for GPUs (and for CPU tensors in Triton's interpreter, which is for tests)
A named one on an input that it does not take raises; it never falls back. None may, and says so once.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference, torch_impl
from .checks import autocasted, check_same_kind, checked_dropout_p, checked_seed, seed_of, seed_tensor
from .dispatch import KERNELS, choose_impl, launchers
from .geometry import Size, Window
from .tracing import without_memory


def neighbor_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_size: Size,
    neighbor_size: Size | None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention in which a token does not see its 2D neighbours (UniAD, section 3.2, NMA).

    Key j is hidden from query i when |row_i - row_j| <= h // 2 and |col_i - col_j| <= w // 2: the window is
    clipped at the border, and an even size n acts as n + 1. A query left with no key gives output 0 and
    gradient 0.

    Args:
        query: [B, heads, N, head_dim], or [1, heads, N, head_dim] to serve every element of the batch.
            float32, float16, bfloat16 or float64; under autocast, cast as autocast casts a matrix product.
        key, value: [B, heads, N, head_dim], dtype and device of `query`.
        feature_size: (height, width) of the token grid, N = height * width, tokens numbered row by row.
        neighbor_size: (h, w) of the hidden window in tokens, or None to hide nothing.
        dropout_p: probability in [0, 1) that a softmax weight is dropped; kept ones are divided by 1 - p.
            Decided by 16 random bits a weight, so p acts as the nearest multiple of 2^-16 below 1.
        scale: factor of the scores, finite, 1 / sqrt(head_dim) by default.
        seed: of the dropout: an int, an int64 tensor on the device, [] or, for a part of a batch, [2] with the number
            of its first image (see `uniad_fast.ops.noise`), or None to draw one from torch's generator. The same seed
            drops the same weights in every impl but "torch".
        impl: implementation, see the module.

    Returns:
        [B, heads, N, head_dim] in the dtype of `query`.

    Raises:
        ValueError: shapes, dtypes, devices, window, probability or impl are not as above.
    """
    query, key, value = autocasted(query, key, value)
    window = Window.of(feature_size, neighbor_size)
    _check(query, key, value, window)
    dropout_p = checked_dropout_p(dropout_p)
    seed = checked_seed(seed, query.device)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    impl = choose_impl(impl, query, _kernel_problem(query, scale))
    seed = seed_of(seed, query.device, key.shape[1], impl) if dropout_p > 0 else None
    if impl == "torch":
        return torch_impl.neighbor_masked_attention(query, key, value, window, dropout_p, scale, seed)
    if impl not in KERNELS:
        return reference.neighbor_masked_attention(query, key, value, window, dropout_p, scale, seed)
    arguments = (query, key, value, window, dropout_p, scale, None if seed is None else seed_tensor(seed, query.device))
    if without_memory(query, key, value):
        return attention_forward(*arguments, impl)[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        memory = tuple(getattr(t, "gradient_memory", None) for t in arguments[:3])
        return _Attention.apply(*arguments, impl, memory)
    return launchers(impl).attention_forward(*arguments)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, window: Window) -> None:
    check_same_kind(query=query, key=key, value=value)
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("query", query), ("key", key), ("value", value)))
    if any(t.ndim == 4 and t.shape[2] != window.tokens for t in (query, key, value)):
        raise ValueError(f"feature_size {window.feature_size} has {window.tokens} tokens, got {shapes}")
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(f"key and value must both be [B, heads, N, head_dim], got {shapes}")
    if query.ndim != 4 or query.shape[1:] != key.shape[1:] or query.shape[0] not in (1, key.shape[0]):
        raise ValueError(f"query must have the shape of key, or batch 1, got {shapes}")
    if min(key.shape[1], key.shape[3]) < 1:
        raise ValueError(f"heads and head_dim must be at least 1, got {shapes}")


def _kernel_problem(query: Tensor, scale: float) -> str | None:
    """Why the kernels do not take a query of this shape or such a scale, or None."""
    if query.shape[-1] > 128:
        return f"they take a head_dim up to 128, not {query.shape[-1]}"
    smallest = torch.finfo(torch.float32).tiny
    largest = torch.finfo(torch.float32).max / 2  # it is multiplied by log2(e)
    return (
        None if smallest <= scale <= largest else f"they take a scale from {smallest:.3g} to {largest:.3g}, not {scale}"
    )


class _Attention(torch.autograd.Function):
    """Eager code calls the launchers directly, without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Tensor:
        *ctx.arguments, seed, ctx.impl, ctx.memory = arguments
        out, stats = launchers(ctx.impl).attention_forward(query, key, value, *ctx.arguments, seed)
        ctx.save_for_backward(query, key, value, out, stats, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        into = [None if place is None else place[0].take(place[1]) for place in ctx.memory]
        if tensors[0].shape[0] != tensors[1].shape[0]:
            into[0] = None  # a query for all of the batch, whose gradient is a sum
        own, arguments = launchers(ctx.impl), (out_gradient, *tensors, *ctx.arguments, seed)
        if any(place is not None for place in into):
            gradients = own.attention_backward_into(*arguments, into)
        else:
            gradients = own.attention_backward(*arguments)
        return *gradients, None, None, None, None, None, None


# Where tensors may have no memory, under a tracer or a mode of torch's, the launchers are operators that torch knows.


@torch.library.custom_op("uniad_fast::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, window: Sequence[int],
    dropout_p: float, scale: float, seed: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launchers' `attention_forward` as an operator."""
    return launchers(impl).attention_forward(query, key, value, window, dropout_p, scale, seed)


@attention_forward.register_fake
def _(query: Tensor, key: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = key.shape
    return _tokens_first(key), key.new_empty(batch * heads, 2, tokens, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::attention_backward", mutates_args=())
def attention_backward(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    window: Sequence[int], dropout_p: float, scale: float, seed: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The launchers' `attention_backward` as an operator."""
    arguments = (out_gradient, query, key, value, out, stats, window, dropout_p, scale, seed)
    return launchers(impl).attention_backward(*arguments)


@attention_backward.register_fake
def _(out_gradient: Tensor, query: Tensor, key: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    query_gradient = _tokens_first(key)
    if query.shape[0] != key.shape[0]:
        query_gradient = query.new_empty(query.shape)
    return query_gradient, _tokens_first(key), _tokens_first(key)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.arguments, seed, ctx.impl = inputs
    ctx.save_for_backward(query, key, value, *output, seed)


def _gradients(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = attention_backward(out_gradient, *tensors, *ctx.arguments, seed, ctx.impl)
    return *gradients, None, None, None, None, None


attention_forward.register_autograd(_gradients, setup_context=_save)


def _tokens_first(key: Tensor) -> Tensor:
    """Shape of `key`, laid out as the launchers lay out what they allocate."""
    return key.new_empty(key.transpose(1, 2).shape).transpose(1, 2)
