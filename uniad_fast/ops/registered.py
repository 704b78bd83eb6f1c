"""The kernels as operators of torch.library, for torch.compile and torch.export: launcher, fake, gradient."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def launch(impl: str) -> ModuleType:
    """The launchers of "triton" or "cpu", which take the same arguments; imported by the first call that needs them."""
    if impl == "cpu":
        from ..kernels import cpu

        return cpu
    from ..kernels import launch

    return launch


def cpu_pays() -> bool:
    """Whether the C++ kernels are the fastest way on this processor."""
    from ..kernels import build

    return build.PAYS


@torch.library.custom_op("uniad_fast::attention_forward", mutates_args=())
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    """See `uniad_fast.kernels.launch.attention_forward`."""
    return launch(impl).attention_forward(
        query, key, value, seed, height, width, radius_row, radius_col, dropout_p, scale
    )


@attention_forward.register_fake
def _(query: Tensor, key: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = key.shape
    return _tokens_first(key), key.new_empty(batch * heads, 2, tokens, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::attention_backward", mutates_args=())
def attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `uniad_fast.kernels.launch.attention_backward`."""
    return launch(impl).attention_backward(
        out_gradient, query, key, value, out, stats, seed,
        height, width, radius_row, radius_col, dropout_p, scale,
    )  # fmt: skip


@attention_backward.register_fake
def _(out_gradient: Tensor, query: Tensor, key: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    query_gradient = _tokens_first(key)
    if query.shape[0] != key.shape[0]:
        query_gradient = query.new_empty(query.shape)
    return query_gradient, _tokens_first(key), _tokens_first(key)


def _save_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, seed, *ctx.arguments = inputs
    ctx.save_for_backward(query, key, value, *output, seed)


def _attention_gradients(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(out_gradient, *ctx.saved_tensors, *ctx.arguments)
    return *gradients, None, *(None for _ in ctx.arguments)


attention_forward.register_autograd(_attention_gradients, setup_context=_save_attention)


@torch.library.custom_op("uniad_fast::jitter_forward", mutates_args=())
def jitter_forward(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, scale: float, prob: float, impl: str
) -> tuple[Tensor, Tensor]:
    """See `uniad_fast.kernels.launch.jitter_forward`."""
    return launch(impl).jitter_forward(tokens, weight, bias, seed, scale, prob)


@jitter_forward.register_fake
def _(tokens: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    count = tokens.shape[0]
    return tokens.new_empty(count, weight.shape[0]), tokens.new_empty(count, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::jitter_backward", mutates_args=())
def jitter_backward(
    out_gradient: Tensor,
    tokens: Tensor,
    weight: Tensor,
    deviation: Tensor,
    seed: Tensor,
    scale: float,
    prob: float,
    impl: str,
    with_tokens: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `uniad_fast.kernels.launch.jitter_backward`."""
    return launch(impl).jitter_backward(
        out_gradient, tokens, weight, deviation, seed, scale, prob, with_tokens, with_bias
    )


@jitter_backward.register_fake
def _(
    out_gradient: Tensor,
    tokens: Tensor,
    weight: Tensor,
    deviation: Tensor,
    seed: Tensor,
    scale: float,
    prob: float,
    impl: str,
    with_tokens: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tokens.new_empty(tokens.shape if with_tokens else 0),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0] if with_bias else 0),
    )


def _save_jitter(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tokens, weight, _, seed, *ctx.arguments = inputs
    ctx.save_for_backward(tokens, weight, output[1], seed)


def _jitter_gradients(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    with_tokens, _, with_bias, *_ = ctx.needs_input_grad
    tokens, weight, bias = jitter_backward(out_gradient, *ctx.saved_tensors, *ctx.arguments, with_tokens, with_bias)
    return tokens if with_tokens else None, weight, bias if with_bias else None, *(None for _ in range(4))


jitter_forward.register_autograd(_jitter_gradients, setup_context=_save_jitter)


@torch.library.custom_op("uniad_fast::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """See `uniad_fast.kernels.launch_dropout.norm_forward`."""
    return launch(impl).norm_forward(x, residual, weight, bias, seed, dropout_p, eps)


@norm_forward.register_fake
def _(x: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 2, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::norm_backward", mutates_args=())
def norm_backward(
    out_gradient: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    stats: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `uniad_fast.kernels.launch_dropout.norm_backward`."""
    return launch(impl).norm_backward(out_gradient, x, residual, weight, stats, seed, dropout_p)


@norm_backward.register_fake
def _(out_gradient: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(residual.shape), *(torch.empty_like(weight) for _ in range(2))


def _save_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, seed, ctx.dropout_p, _, ctx.impl = inputs
    ctx.save_for_backward(x, residual, weight, output[1], seed)


def _norm_gradients(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = norm_backward(out_gradient, *ctx.saved_tensors, ctx.dropout_p, ctx.impl)
    return *gradients, *(None for _ in range(4))


norm_forward.register_autograd(_norm_gradients, setup_context=_save_norm)


@torch.library.custom_op("uniad_fast::dropout_forward", mutates_args=())
def dropout_forward(x: Tensor, seed: Tensor | None, dropout_p: float, relu: bool, impl: str) -> Tensor:
    """See `uniad_fast.kernels.launch_dropout.dropout_forward`."""
    return launch(impl).dropout_forward(x, seed, dropout_p, relu)


@dropout_forward.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("uniad_fast::dropout_backward", mutates_args=())
def dropout_backward(
    out_gradient: Tensor, out: Tensor, seed: Tensor | None, dropout_p: float, relu: bool, impl: str
) -> Tensor:
    """See `uniad_fast.kernels.launch_dropout.dropout_backward`."""
    return launch(impl).dropout_backward(out_gradient, out, seed, dropout_p, relu)


@dropout_backward.register_fake
def _(out_gradient: Tensor, out: Tensor, *_rest: Any) -> Tensor:
    return out.new_empty(out.shape)


def _save_dropout(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, seed, *ctx.arguments = inputs
    ctx.save_for_backward(output, seed)


def _dropout_gradients(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    return dropout_backward(out_gradient, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


dropout_forward.register_autograd(_dropout_gradients, setup_context=_save_dropout)


def _tokens_first(key: Tensor) -> Tensor:
    """Shape of `key`, laid out as the launchers lay out what they allocate."""
    return key.new_empty(key.transpose(1, 2).shape).transpose(1, 2)
