"""From tensors on a CPU to the C++ kernels: allocate, describe, call. No mathematics, no checks of users."""

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import (
    NOWHERE,
    Into,
    Window,
    contiguous,
    jitter_threshold,
    keep_threshold,
    like_tokens_first,
    noise_numbers,
    summed_over_batch,
    unit_last_stride,
)
from .build import load, problem

__all__ = [
    "attention_backward",
    "attention_backward_into",
    "attention_forward",
    "dropout_backward",
    "dropout_forward",
    "jitter_backward",
    "jitter_forward",
    "norm_backward",
    "norm_forward",
    "problem",
]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Attention(ctypes.Structure):
    """`Problem` of neighbor_masked_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "height", "width")),
        *((name, ctypes.c_int64) for name in ("radius_row", "radius_col", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "scale_log2", "keep_scale")),
        ("keep_threshold", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("seed", "first")),
    ]


class _Jitter(ctypes.Structure):
    """`Problem` of jitter_project.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "outs")),
        ("scale_by_channels", ctypes.c_float),
        ("prob_threshold", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("seed", "first")),
    ]


class _Rows(ctypes.Structure):
    """`Problem` of dropout.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "residual_rows")),
        *((name, ctypes.c_float) for name in ("eps", "keep_scale")),
        ("keep_threshold", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("seed", "first")),
    ]


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, window: Window, dropout_p: float, scale: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out [B, H, N, D] and the softmax's stats, float32 [B * H, 2, N]: largest product, base-2 log of the sum.

    query [B or 1, H, N, D], key and value [B, H, N, D].
    """
    batch, heads, tokens, _ = key.shape
    out = like_tokens_first(key)
    stats = _floats(batch * heads, 2, tokens)
    if out.numel() > 0:
        query, key, value = (unit_last_stride(t) for t in (query.expand_as(key), key, value))
        _call(
            load().uniad_attention_forward,
            key.dtype,
            _attention(key, window, dropout_p, scale, seed),
            *(query, key, value, out, stats),
            _strides(query, key, value, out),
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
    query_gradient, key_gradient, value_gradient = (like_tokens_first(key) if t is None else t for t in into)
    if key.numel() == 0:
        return (query_gradient.new_zeros(query.shape) if broadcast else query_gradient), key_gradient, value_gradient
    library = load()
    splits = library.uniad_attention_splits(ctypes.c_int64(tokens))
    # Parts are summed in float32, in torch's fixed order.
    parts = _floats(splits, batch, heads, tokens, head_dim) if broadcast or splits > 1 else None
    inputs = [unit_last_stride(t) for t in (query.expand_as(key), key, value, out, out_gradient)]
    gradients = (query_gradient, key_gradient, value_gradient)
    tensors = [*inputs, contiguous(stats), *gradients]  # held until the kernel has returned
    _call(
        library.uniad_attention_backward,
        key.dtype,
        _attention(key, window, dropout_p, scale, seed),
        (ctypes.c_void_p * 9)(*map(_pointer, tensors)),
        parts,
        _strides(*inputs, *gradients),
    )
    if parts is not None and broadcast:
        query_gradient = parts.sum((0, 1)).unsqueeze(0).to(query.dtype)
    elif parts is not None:
        query_gradient.copy_(parts.sum(0))  # keeps its layout, which compiled code relies on
    return query_gradient, key_gradient, value_gradient


def jitter_forward(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, scale: float, prob: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Out [T, O] and the deviation of each token's noise, float32 [T], of tokens [T, C], weight [O, C], bias [O]."""
    out = tokens.new_empty(tokens.shape[0], weight.shape[0])
    deviation = _floats(tokens.shape[0])
    if out.numel() > 0:
        problem_of = _jitter(tokens, weight, scale, prob, seed)
        tokens, weight, bias = contiguous(tokens), contiguous(weight), None if bias is None else contiguous(bias)
        _call(load().uniad_jitter_forward, tokens.dtype, problem_of, tokens, weight, bias, out, deviation)
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
    """Gradients of tokens, weight and bias; those not asked for are empty."""
    out_gradient, tokens, weight, deviation = (contiguous(t) for t in (out_gradient, tokens, weight, deviation))
    (count, channels), outs = tokens.shape, weight.shape[0]
    token_gradient = torch.zeros_like(tokens) if with_tokens else tokens.new_empty(0)
    parts, bias_parts = _floats(1, outs, channels).zero_(), _floats(1, outs).zero_()
    if count and outs and channels:
        library = load()
        splits = library.uniad_jitter_splits(ctypes.c_int64(count))
        parts, bias_parts = _floats(splits, outs, channels), _floats(splits, outs)
        _call(
            library.uniad_jitter_backward,
            tokens.dtype,
            _jitter(tokens, weight, scale, prob, seed),
            *(out_gradient, tokens, weight, deviation),
            *(parts, bias_parts, token_gradient if with_tokens else None),
        )
    bias_gradient = bias_parts.sum(0).to(weight.dtype) if with_bias else weight.new_empty(0)
    return token_gradient, parts.sum(0).to(weight.dtype), bias_gradient


def norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, eps: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) [R, C] and its mean and reciprocal deviation, float32 [R, 2].

    x [R, C]; residual [R', C], row r meets row r % R'; weight and bias float32 [C].
    """
    x, residual, weight, bias = (contiguous(t) for t in (x, residual, weight, bias))
    out, stats = torch.empty_like(x), _floats(x.shape[0], 2)
    if out.numel() > 0:
        rows = _rows(x, residual.shape[0], dropout_p, eps, seed)
        _call(load().uniad_norm_forward, x.dtype, rows, x, residual, weight, bias, out, stats)
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
    out_gradient, x, residual = (contiguous(t) for t in (out_gradient, x, residual))
    weight, stats = contiguous(weight), contiguous(stats)
    # Two tensors even where they are equal, without dropout: whoever gets one may add to it in place.
    sum_gradient, x_gradient = torch.empty_like(x), torch.empty_like(x)
    parts = _floats(1, 2, x.shape[1]).zero_()
    if x.numel() > 0:
        library = load()
        parts = _floats(library.uniad_norm_splits(ctypes.c_int64(x.shape[0])), 2, x.shape[1])
        _call(
            library.uniad_norm_backward,
            x.dtype,
            _rows(x, residual.shape[0], dropout_p, 0.0, seed),
            *(out_gradient, x, residual, weight, stats),
            *(sum_gradient, x_gradient, parts),
        )
    weight_and_bias = parts.sum(0)
    return x_gradient, summed_over_batch(sum_gradient, residual), weight_and_bias[0], weight_and_bias[1]


def dropout_forward(x: Tensor, dropout_p: float, relu: bool, seed: Tensor | None) -> Tensor:
    """dropout(x), or dropout(relu(x)), of x [R, C]."""
    x = contiguous(x)
    return _dropout_into(torch.empty_like(x), x, dropout_p, relu, seed)


def relu_dropout_in_place(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x [R, C], contiguous, which is dropout(relu(x)) afterwards."""
    return _dropout_into(x, x, dropout_p, True, seed)


def _dropout_into(out: Tensor, x: Tensor, dropout_p: float, relu: bool, seed: Tensor | None) -> Tensor:
    if x.numel() > 0:
        _call(load().uniad_dropout_forward, x.dtype, _rows(x, 1, dropout_p, 0.0, seed), relu, x, out)
    return out


def dropout_backward(out_gradient: Tensor, out: Tensor, dropout_p: float, relu: bool, seed: Tensor | None) -> Tensor:
    """Gradient of x, from what `dropout_forward` gave."""
    out_gradient, out = contiguous(out_gradient), contiguous(out)
    gradient = torch.empty_like(out)
    if out.numel() > 0:
        rows = _rows(out, 1, dropout_p, 0.0, seed)
        _call(load().uniad_dropout_backward, out.dtype, rows, relu, out_gradient, out, gradient)
    return gradient


def _call(
    function: Callable[..., None], dtype: torch.dtype, problem_of: "ctypes._CArgObject", *arguments: object
) -> None:
    """Call a kernel. Tensors go in as pointers, and are held here until it returns: a copy made for it lives as long.

    Only an array of pointers is made elsewhere, from tensors that have a name there.
    """
    function(_DTYPES[dtype], problem_of, *(_pointer(a) if isinstance(a, Tensor) else a for a in arguments))


def _attention(
    key: Tensor, window: Window, dropout_p: float, scale: float, seed: Tensor | None
) -> "ctypes._CArgObject":
    batch, heads, _, head_dim = key.shape
    return ctypes.byref(
        _Attention(
            batch, heads, *window, head_dim, scale, scale * math.log2(math.e),
            1 / (1 - dropout_p), keep_threshold(dropout_p), *noise_numbers(seed),
        )
    )  # fmt: skip


def _jitter(tokens: Tensor, weight: Tensor, scale: float, prob: float, seed: Tensor) -> "ctypes._CArgObject":
    count, channels = tokens.shape
    threshold = jitter_threshold(prob)
    return ctypes.byref(_Jitter(count, channels, weight.shape[0], scale / channels, threshold, *noise_numbers(seed)))


def _rows(x: Tensor, residual_rows: int, dropout_p: float, eps: float, seed: Tensor | None) -> "ctypes._CArgObject":
    threshold = keep_threshold(dropout_p)
    return ctypes.byref(_Rows(*x.shape, residual_rows, eps, 1 / (1 - dropout_p), threshold, *noise_numbers(seed)))


def _floats(*shape: int) -> Tensor:
    """Uninitialised float32, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _strides(*tensors: Tensor) -> ctypes.Array:
    numbers = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    address = tensor.data_ptr()
    if tensor.device.type != "cpu" or (address == 0 and tensor.numel() > 0):
        raise RuntimeError(f"a {type(tensor).__name__} on {tensor.device} has no memory for a C++ kernel to work on")
    return ctypes.c_void_p(address)
