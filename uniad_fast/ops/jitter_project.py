"""Feature jitter and the input projection in one pass: the public op, its gradient, its operators."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference, torch_impl
from .checks import autocasted, check_same_kind, checked_seed, seed_of, seed_tensor
from .dispatch import KERNELS, choose_impl, launchers
from .tracing import without_memory


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
        seed: of the noise, see `uniad_fast.ops.neighbor_masked_attention`.
        impl: implementation, see `uniad_fast.ops.neighbor_masked_attention`.

    Returns:
        [..., C_out] in the dtype of `tokens`.

    Raises:
        ValueError: shapes, dtypes, devices, scale, probability or impl are not as above.
    """
    if bias is None:
        tokens, weight = autocasted(tokens, weight)
    else:
        tokens, weight, bias = autocasted(tokens, weight, bias)
    _check(tokens, weight, bias)
    scale, prob = float(scale), float(prob)
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number >= 0, got {scale}")
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    seed = checked_seed(seed, tokens.device)
    impl = choose_impl(impl, tokens)
    seed = seed_of(seed, tokens.device, math.prod(tokens.shape[1:-1]), impl)
    if impl == "torch":
        return torch_impl.jitter_project(tokens, weight, bias, scale, prob, seed)
    assert seed is not None
    if impl not in KERNELS:
        return reference.jitter_project(tokens, weight, bias, scale, prob, seed)
    flat = tokens.reshape(math.prod(tokens.shape[:-1]), tokens.shape[-1])  # C_in may be 0
    arguments = (flat, weight, bias, scale, prob, seed_tensor(seed, tokens.device))
    if without_memory(tokens, weight, bias):
        out = jitter_forward(*arguments, impl)[0]
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (tokens, weight, bias)):
        out = _Jitter.apply(*arguments, impl)
    else:
        out = launchers(impl).jitter_forward(*arguments)[0]
    return out.view(*tokens.shape[:-1], weight.shape[0])


def _check(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_same_kind(tokens=tokens, weight=weight, **({} if bias is None else {"bias": bias}))
    if tokens.ndim < 1 or weight.ndim != 2 or tokens.shape[-1] != weight.shape[1] or not weight.shape[1]:
        raise ValueError(
            "tokens must be [..., C_in] and weight [C_out, C_in], C_in at least 1, "
            f"got {tuple(tokens.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight is, got {tuple(bias.shape)}")


class _Jitter(torch.autograd.Function):
    """Eager code calls the launchers directly, without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        *ctx.arguments, seed, ctx.impl = arguments
        out, deviation = launchers(ctx.impl).jitter_forward(tokens, weight, bias, *ctx.arguments, seed)
        ctx.save_for_backward(tokens, weight, deviation, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        with_tokens, _, with_bias, *_ = ctx.needs_input_grad
        *tensors, seed = ctx.saved_tensors
        arguments = (out_gradient, *tensors, *ctx.arguments, with_tokens, with_bias, seed)
        return _wanted(launchers(ctx.impl).jitter_backward(*arguments), with_tokens, with_bias)


@torch.library.custom_op("uniad_fast::jitter_forward", mutates_args=())
def jitter_forward(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, scale: float, prob: float, seed: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """The launchers' `jitter_forward` as an operator."""
    return launchers(impl).jitter_forward(tokens, weight, bias, scale, prob, seed)


@jitter_forward.register_fake
def _(tokens: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    count = tokens.shape[0]
    return tokens.new_empty(count, weight.shape[0]), tokens.new_empty(count, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::jitter_backward", mutates_args=())
def jitter_backward(
    out_gradient: Tensor, tokens: Tensor, weight: Tensor, deviation: Tensor, scale: float, prob: float,
    with_tokens: bool, with_bias: bool, seed: Tensor, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The launchers' `jitter_backward` as an operator; gradients that are not asked for are empty."""
    arguments = (out_gradient, tokens, weight, deviation, scale, prob, with_tokens, with_bias, seed)
    of_tokens, of_weight, of_bias = launchers(impl).jitter_backward(*arguments)
    return of_tokens, of_weight.clone(), of_bias.clone()  # no two of an operator's may share memory


@jitter_backward.register_fake
def _(out_gradient: Tensor, tokens: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _deviation, _scale, _prob, with_tokens, with_bias, *_ = rest
    return (
        tokens.new_empty(tokens.shape if with_tokens else 0),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0] if with_bias else 0),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tokens, weight, _, *ctx.arguments, seed, ctx.impl = inputs
    ctx.save_for_backward(tokens, weight, output[1], seed)


def _gradients(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    with_tokens, _, with_bias, *_ = ctx.needs_input_grad
    *tensors, seed = ctx.saved_tensors
    arguments = (out_gradient, *tensors, *ctx.arguments, with_tokens, with_bias, seed)
    return _wanted(jitter_backward(*arguments, ctx.impl), with_tokens, with_bias)


jitter_forward.register_autograd(_gradients, setup_context=_save)


def _wanted(gradients: tuple[Tensor, ...], with_tokens: bool, with_bias: bool) -> tuple[Tensor | None, ...]:
    """The op's arguments' gradients, None for those that were not asked for."""
    tokens, weight, bias = gradients
    return tokens if with_tokens else None, weight, bias if with_bias else None, None, None, None, None
