"""torch.autograd.Functions over the kernels: save, call, no mathematics.

Eager code calls the launchers directly, without an operator's dispatch. Where tensors may have no memory, under a
tracer or a mode of torch's, it goes through operators that torch knows: see `registered`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import registered
from .geometry import Size, is_traced, neighborhood_radius


def neighbor_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_size: Size,
    neighbor_size: Size | None,
    dropout_p: float,
    scale: float,
    seed: Tensor | None,
    impl: str,
) -> Tensor:
    """As `reference.neighbor_masked_attention`, by the kernels; the seed is a 0-d int64 tensor on the device."""
    arguments = (*feature_size, *neighborhood_radius(neighbor_size), dropout_p, scale)
    if _without_memory(query, key, value):
        return registered.attention_forward(query, key, value, seed, *arguments, impl)[0]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(query, key, value, seed, arguments, impl)
    return registered.launch(impl).attention_forward(query, key, value, seed, *arguments)[0]


def jitter_project(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, scale: float, prob: float, seed: Tensor, impl: str
) -> Tensor:
    """As `reference.jitter_project`, by the kernels; the seed is a 0-d int64 tensor on the device."""
    flat = _rows(tokens)
    wanted = tokens.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if _without_memory(tokens, weight, *([] if bias is None else [bias])):
        out, _ = registered.jitter_forward(flat, weight, bias, seed, scale, prob, impl)
    elif torch.is_grad_enabled() and wanted:
        out = _Jitter.apply(flat, weight, bias, scale, prob, seed, impl)
    else:
        out, _ = registered.launch(impl).jitter_forward(flat, weight, bias, seed, scale, prob)
    return out.view(*tokens.shape[:-1], weight.shape[0])


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    impl: str,
) -> Tensor:
    """As `reference.dropout_add_norm`, by the kernels; the seed is a 0-d int64 tensor on the device."""
    rows, residual_rows = _rows(x), _rows(residual)
    arguments = (rows, residual_rows, weight, bias, seed, dropout_p, eps)
    if _without_memory(*arguments[:4]):
        out, _ = registered.norm_forward(*arguments, impl)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in arguments[:4]):
        out = _Norm.apply(*arguments, impl)
    else:
        out, _ = registered.launch(impl).norm_forward(*arguments)
    return out.view(x.shape)


def dropout(x: Tensor, dropout_p: float, relu: bool, seed: Tensor | None, impl: str) -> Tensor:
    """As `reference.dropout`, by the kernels; the seed is a 0-d int64 tensor on the device."""
    arguments = (_rows(x), seed, dropout_p, relu)
    if _without_memory(x):
        out = registered.dropout_forward(*arguments, impl)
    elif torch.is_grad_enabled() and x.requires_grad:
        out = _Dropout.apply(*arguments, impl)
    else:
        out = registered.launch(impl).dropout_forward(*arguments)
    return out.view(x.shape)


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] -> [R, C]; C may be 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _without_memory(*tensors: Tensor) -> bool:
    """Whether a launcher can't be handed these: they are traced, or of a class that answers for its own operators."""
    return is_traced() or any(type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, arguments: tuple, impl: str
    ) -> Tensor:
        out, stats = registered.launch(impl).attention_forward(query, key, value, seed, *arguments)
        ctx.save_for_backward(query, key, value, out, stats, seed)
        ctx.arguments, ctx.impl = arguments, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, stats, seed = ctx.saved_tensors
        gradients = registered.launch(ctx.impl).attention_backward(
            out_gradient, query, key, value, out, stats, seed, *ctx.arguments
        )
        return *gradients, None, None, None


class _Jitter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        prob: float,
        seed: Tensor,
        impl: str,
    ) -> Tensor:
        out, deviation = registered.launch(impl).jitter_forward(tokens, weight, bias, seed, scale, prob)
        ctx.save_for_backward(tokens, weight, deviation, seed)
        ctx.arguments, ctx.impl = (scale, prob), impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        with_tokens, _, with_bias, *_ = ctx.needs_input_grad
        tokens, weight, deviation, seed = ctx.saved_tensors
        gradients = registered.launch(ctx.impl).jitter_backward(
            out_gradient, tokens, weight, deviation, seed, *ctx.arguments, with_tokens, with_bias
        )
        wanted = (with_tokens, True, with_bias)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None for _ in range(4))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        seed: Tensor | None,
        dropout_p: float,
        eps: float,
        impl: str,
    ) -> Tensor:
        out, stats = registered.launch(impl).norm_forward(x, residual, weight, bias, seed, dropout_p, eps)
        ctx.save_for_backward(x, residual, weight, stats, seed)
        ctx.dropout_p, ctx.impl = dropout_p, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = registered.launch(ctx.impl).norm_backward(out_gradient, *ctx.saved_tensors, ctx.dropout_p)
        return *gradients, None, None, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, dropout_p: float, relu: bool, impl: str) -> Tensor:
        out = registered.launch(impl).dropout_forward(x, seed, dropout_p, relu)
        ctx.save_for_backward(out if relu else None, seed)
        ctx.arguments, ctx.impl = (dropout_p, relu), impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        out, seed = ctx.saved_tensors
        out = out_gradient if out is None else out  # not read without ReLU, but for its shape
        gradient = registered.launch(ctx.impl).dropout_backward(out_gradient, out, seed, *ctx.arguments)
        return gradient, None, None, None, None
