"""The FFN of a transformer's layer as one function of autograd's: linear, ReLU, dropout, linear."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import products
from .checks import seed_tensor
from .dropout import checked, dropout
from .linear import (
    Gradients,
    Layer,
    are_parameters,
    as_rows,
    gradients_of,
    is_chosen,
    is_differentiated,
    is_torchs,
    kept_weight,
    linear,
    output_of,
    unflattened,
    ways_of,
)


def feed_forward(tokens: Tensor, first: Layer, second: Layer, dropout_p: float, impl: str | None) -> Tensor:
    """second(dropout(relu(first(tokens)))), both `linear`.

    Where all of it is ours, one tensor of the hidden width is made instead of two: ReLU and dropout are in the place of
    the first product, which is nobody else's. The noise is that of `dropout`.

    tokens [..., C_in] -> [..., C_out].
    """
    if tokens.ndim < 2 or not (is_chosen(tokens, first, impl) and _follows(first, second)):
        hidden = dropout(linear(tokens, *first, impl), dropout_p, relu=True, impl=impl)
        return linear(hidden, *second, impl)
    dropout_p, seed, impl = checked(tokens, dropout_p, None, impl)
    seed = None if seed is None else seed_tensor(seed, tokens.device)
    rows = as_rows(tokens)
    if is_differentiated(tokens, *first, *second):
        out = _FeedForward.apply(rows, *first, *second, dropout_p, seed)
    else:
        out = output_of(output_of(rows, *first, (dropout_p, seed)), *second)
    return unflattened(out, tokens)


def _follows(first: Layer, second: Layer) -> bool:
    """Whether a layer like the first one takes what that gives."""
    return are_parameters(*second) and second[0].shape[1] == first[0].shape[0]


class _FeedForward(torch.autograd.Function):
    """ReLU's gradient is read off what came of it: above 0 is what was above 0 and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        second_weight: Tensor,
        second_bias: Tensor | None,
        *ending: Any,
    ) -> Tensor:
        with_rows, with_weight, with_bias, with_second, _ = ctx.needs_input_grad[:5]
        ctx.ways, ctx.dropout_p = (ways_of(rows, weight), ways_of(rows, second_weight)), ending[0]
        operands = [
            products.operand(ways.output, each, rows.dtype)
            for ways, each in zip(ctx.ways, (weight, second_weight), strict=True)
        ]
        hidden = products.output(ctx.ways[0].output, rows, operands[0], bias, ending)
        into_first = with_rows or with_weight or with_bias
        ctx.save_for_backward(
            rows if with_weight else None,
            kept_weight(ctx.ways[0], weight, operands[0], rows.dtype) if with_rows else None,
            hidden if into_first or with_second else None,
            kept_weight(ctx.ways[1], second_weight, operands[1], rows.dtype) if into_first else None,
        )
        return products.output(ctx.ways[1].output, hidden, operands[1], second_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, hidden, second_weight = ctx.saved_tensors
        _, _, with_bias, with_second, with_second_bias = ctx.needs_input_grad[:5]
        first, second = ctx.ways
        with torch.autocast("cpu", enabled=False):  # a backward pass may be called inside
            gradients: Gradients = None, None, None
            if second_weight is not None:
                gradient = _hidden_gradient(second, out_gradient, second_weight, hidden, ctx.dropout_p)
                gradients = gradients_of(first, gradient, rows, weight, with_bias)
            of_second = gradients_of(second, out_gradient, hidden if with_second else None, None, with_second_bias)
        return *gradients, *of_second[1:], None, None


def _hidden_gradient(
    ways: products.Ways, out_gradient: Tensor, weight: Tensor, hidden: Tensor, dropout_p: float
) -> Tensor:
    """Of what was before ReLU and dropout, which gave `hidden`: it was multiplied by the weight."""
    if is_torchs(out_gradient):
        gradient = torch.mm(out_gradient, weight.to(out_gradient.dtype))
        return torch.where(hidden > 0, gradient / (1 - dropout_p), 0)
    return products.token_gradient(ways.token_gradient, out_gradient, weight, (dropout_p, None), hidden)
