"""The public ops: check the arguments, choose an implementation, call it.

impl, for both ops:
    None         the best for the tensors' device
    "reference"  the definition: plain PyTorch, materialised, any device, float64 too
    "torch"      stock PyTorch: scaled_dot_product_attention with a cached dense mask
    "cpu"        C++ kernels, compiled for this processor by the first call
    "triton"     fused Triton kernels, for GPUs (and for CPU tensors in Triton's interpreter, which is for tests)
A named one on an input that it does not take raises; it never falls back. None may, and says so once.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.precision import warn_if_emulated
from . import autograd, reference
from . import torch_impl as stock
from .dispatch import KERNELS, attention_problem, choose_impl
from .geometry import Size
from .noise import draw_seed, drawable

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        seed: of the dropout: an int, a 0-d int64 tensor on the device, or None to draw one from torch's
            generator. The same seed drops the same weights in every impl but "torch".
        impl: see the module.

    Returns:
        [B, heads, N, head_dim] in the dtype of `query`.

    Raises:
        ValueError: shapes, dtypes, devices, window, probability or impl are not as above.
    """
    query, key, value = _autocast(query, key, value)
    feature_size = size_pair("feature_size", feature_size)
    if neighbor_size is not None:
        height, width = size_pair("neighbor_size", neighbor_size)
        # What reaches across the grid hides no more if it is larger, and then fits the kernels' integers.
        neighbor_size = min(height, 2 * feature_size[0]), min(width, 2 * feature_size[1])
    _check_attention(query, key, value, feature_size)
    dropout_p = _dropout_probability(dropout_p)
    seed = _checked_seed(seed, query.device)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    impl = choose_impl(impl, query, attention_problem(query, scale))

    if impl == "torch":
        return stock.neighbor_masked_attention(query, key, value, feature_size, neighbor_size, dropout_p, scale, seed)
    if dropout_p > 0 and seed is None:
        seed = draw_seed(query.device)
    if impl in KERNELS:
        seed = _seed_tensor(seed, query.device) if dropout_p > 0 else None
        return autograd.neighbor_masked_attention(
            query, key, value, feature_size, neighbor_size, dropout_p, scale, seed, impl
        )
    return reference.neighbor_masked_attention(query, key, value, feature_size, neighbor_size, dropout_p, scale, seed)


def jitter_project(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    prob: float = 1.0,
    seed: int | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """linear(tokens + noise), the feature jitter and the input projection in one (UniAD, section 3.2, FJ).

    noise ~ N(0, (scale * ||token||_2 / C_in)^2), added to each token with probability `prob`.

    Args:
        tokens: [..., C_in], float32, float16, bfloat16 or float64; under autocast, cast as for a linear layer.
        weight: [C_out, C_in], dtype and device of `tokens`.
        bias: [C_out] or None.
        scale: the paper's alpha, >= 0.
        prob: probability in [0, 1] that a token is jittered.
        seed: of the noise: an int, a 0-d int64 tensor on the device, or None to draw one from torch's generator.
        impl: see the module.

    Returns:
        [..., C_out] in the dtype of `tokens`.

    Raises:
        ValueError: shapes, dtypes, devices, scale, probability or impl are not as above.
    """
    if bias is None:
        tokens, weight = _autocast(tokens, weight)
    else:
        tokens, weight, bias = _autocast(tokens, weight, bias)
    _check_same_kind(tokens=tokens, weight=weight, **({} if bias is None else {"bias": bias}))
    if tokens.ndim < 1 or weight.ndim != 2 or tokens.shape[-1] != weight.shape[1] or not weight.shape[1]:
        raise ValueError(
            "tokens must be [..., C_in] and weight [C_out, C_in], C_in at least 1, "
            f"got {tuple(tokens.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight is, got {tuple(bias.shape)}")
    scale, prob = float(scale), float(prob)
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number >= 0, got {scale}")
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    seed = _checked_seed(seed, tokens.device)
    impl = choose_impl(impl, tokens)

    if impl == "torch":
        return stock.jitter_project(tokens, weight, bias, scale, prob, seed)
    if seed is None:
        seed = draw_seed(tokens.device)
    if impl in KERNELS:
        return autograd.jitter_project(tokens, weight, bias, scale, prob, _seed_tensor(seed, tokens.device), impl)
    return reference.jitter_project(tokens, weight, bias, scale, prob, seed)


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)): the end of a post-norm block in one pass.

    Args:
        x: [B, ..., C], float32, float16, bfloat16 or float64; under autocast, cast as for a linear layer.
        residual: the shape of `x`, or batch 1 to meet every element of the batch; dtype and device of `x`.
        weight, bias: [C], of the norm; any floating dtype, used in float32.
        dropout_p: probability in [0, 1) that an element of `x` is dropped; kept ones are divided by 1 - p.
        eps: added to the variance, finite and >= 0.
        seed: of the dropout: an int, a 0-d int64 tensor on the device, or None to draw one from torch's generator.
        impl: see the module.

    Returns:
        [B, ..., C] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices, probability or impl are not as above.
    """
    x, residual = _autocast(x, residual)
    _check_same_kind(x=x, residual=residual)
    if x.ndim < 1 or (residual.shape != x.shape and (x.ndim < 2 or residual.shape != (1, *x.shape[1:]))):
        raise ValueError(
            f"residual must have the shape of x, or batch 1, got {tuple(residual.shape)}, {tuple(x.shape)}"
        )
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight and bias must be [{x.shape[-1]}] as x's last axis, got {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(f"{name} must be floating point and on {x.device}, got {tensor.dtype} on {tensor.device}")
    eps = float(eps)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    dropout_p, seed, impl = _check_dropout(x, dropout_p, seed, impl)
    if impl == "torch":
        return stock.dropout_add_norm(x, residual, weight, bias, dropout_p, eps, seed)
    if impl == "reference":
        return reference.dropout_add_norm(x, residual, weight, bias, dropout_p, eps, seed)
    seed = None if seed is None else _seed_tensor(seed, x.device)
    return autograd.dropout_add_norm(x, residual, weight.float(), bias.float(), dropout_p, eps, seed, impl)


def dropout(
    x: Tensor,
    dropout_p: float,
    *,
    relu: bool = False,
    seed: int | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """dropout(x), or dropout(relu(x)) in one pass.

    Args:
        x: [..., C], float32, float16, bfloat16 or float64.
        dropout_p, seed, impl: as in `dropout_add_norm`.

    Returns:
        The shape and dtype of `x`; `x` itself where there is nothing to do.

    Raises:
        ValueError: the dtype, the probability or impl are not as above.
    """
    _check_same_kind(x=x)
    if x.ndim < 1:
        raise ValueError(f"x must be [..., C], got {tuple(x.shape)}")
    dropout_p, seed, impl = _check_dropout(x, dropout_p, seed, impl)
    if dropout_p == 0 and not relu:
        return x
    if impl == "torch":
        return stock.dropout(x, dropout_p, relu, seed)
    if impl == "reference":
        return reference.dropout(x, dropout_p, relu, seed)
    return autograd.dropout(x, dropout_p, relu, None if seed is None else _seed_tensor(seed, x.device), impl)


def _check_dropout(
    x: Tensor, dropout_p: float, seed: int | Tensor | None, impl: str | None
) -> tuple[float, int | Tensor | None, str]:
    """The probability that acts, the seed that it needs (None without dropout), and the implementation for x."""
    dropout_p = _dropout_probability(dropout_p)
    seed = _checked_seed(seed, x.device)
    impl = choose_impl(impl, x)
    if dropout_p == 0:
        return dropout_p, None, impl
    return dropout_p, draw_seed(x.device) if seed is None and impl != "torch" else seed, impl


def _dropout_probability(dropout_p: float) -> float:
    """The probability that acts, see `noise.drawable`."""
    dropout_p = float(dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return drawable(dropout_p)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    assert seed is not None
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def size_pair(name: str, size: Size | Sequence[Any]) -> Size:
    """`size` as a (height, width) tuple of ints >= 1; ValueError, naming the argument, if it is none."""
    try:
        height, width = (operator.index(n) for n in size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be (height, width), two integers >= 1, got {size!r}")
    return height, width


def _check_attention(query: Tensor, key: Tensor, value: Tensor, feature_size: Size) -> None:
    _check_same_kind(query=query, key=key, value=value)
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("query", query), ("key", key), ("value", value)))
    tokens = feature_size[0] * feature_size[1]
    if any(t.ndim == 4 and t.shape[2] != tokens for t in (query, key, value)):
        raise ValueError(f"feature_size {feature_size} has {tokens} tokens, got {shapes}")
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(f"key and value must both be [B, heads, N, head_dim], got {shapes}")
    if query.ndim != 4 or query.shape[1:] != key.shape[1:] or query.shape[0] not in (1, key.shape[0]):
        raise ValueError(f"query must have the shape of key, or batch 1, got {shapes}")
    if min(key.shape[1], key.shape[3]) < 1:
        raise ValueError(f"heads and head_dim must be at least 1, got {shapes}")


def _check_same_kind(**tensors: Tensor) -> None:
    """All dense, floating point, of one dtype and on one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name} must be a dense tensor, got a {kind} one")
    if first.dtype not in _FLOATS:
        raise ValueError(f"{first_name} must be float32, float16, bfloat16 or float64, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(f"{first_name} is {first.dtype} but {name} is {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{first_name} is on {first.device} but {name} on {tensor.device}")


def _checked_seed(seed: int | Tensor | None, device: torch.device) -> int | Tensor | None:
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"a seed tensor must be 0-d int64 on {device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            )
    elif seed is not None:
        try:
            seed = operator.index(seed)
        except TypeError:
            raise ValueError(f"seed must be an integer, a tensor or None, got {seed!r}") from None
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")
    return seed


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    warn_if_emulated(dtype, device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
