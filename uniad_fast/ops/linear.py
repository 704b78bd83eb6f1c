"""The products of a linear layer on a CPU, by what is fastest there (see `products`), and what is torch's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import products
from .checks import seed_tensor
from .dispatch import choose_impl
from .dropout import checked, dropout
from .tracing import is_traced, without_memory

Layer = tuple[Tensor, Tensor | None]
"""Weight [C_out, C_in] and bias [C_out] of a linear layer."""


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, impl: str | None) -> Tensor:
    """`torch.nn.functional.linear`; by `products` where `impl` means the CPU kernels and parameters are float32.

    Under autocast to bfloat16, gradients of weight and bias are not rounded to it on the way.

    tokens [..., C_in], weight [C_out, C_in], bias [C_out] -> [..., C_out].
    """
    if not _is_chosen(tokens, (weight, bias), impl):
        return F.linear(tokens, weight, bias)
    rows = _rows(tokens)
    out = _Linear.apply(rows, weight, bias) if _differentiated(tokens, weight, bias) else _output(rows, weight, bias)
    return _unflattened(out, tokens)


def feed_forward(tokens: Tensor, first: Layer, second: Layer, dropout_p: float, impl: str | None) -> Tensor:
    """second(dropout(relu(first(tokens)))), both `linear`.

    Where all of it is ours, one tensor of the hidden width is made instead of two: ReLU and dropout are in the place of
    the first product, which is nobody else's. The noise is that of `dropout`.

    tokens [..., C_in] -> [..., C_out].
    """
    if tokens.ndim < 2 or not (_is_chosen(tokens, first, impl) and _follows(first, second)):
        hidden = dropout(linear(tokens, *first, impl), dropout_p, relu=True, impl=impl)
        return linear(hidden, *second, impl)
    dropout_p, seed, impl = checked(tokens, dropout_p, None, impl)
    seed = None if seed is None else seed_tensor(seed, tokens.device)
    rows = _rows(tokens)
    if _differentiated(tokens, *first, *second):
        out = _FeedForward.apply(rows, *first, *second, dropout_p, seed)
    else:
        out = _output(_output(rows, *first, (dropout_p, seed)), *second)
    return _unflattened(out, tokens)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """rows [R, K] times weight [O, K], plus bias [O]: [R, O], into `out` if there is one; no gradient is recorded."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def add_product(total: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """total [R, O] with the product of rows [R, K] and weight [O, K] added in place; no gradient is recorded."""
    return total.addmm_(rows, weight.t())


def _rows(tokens: Tensor) -> Tensor:
    """[..., C] -> [R, C], in the dtype that autocast gives them."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    return rows.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else rows


def _unflattened(out: Tensor, tokens: Tensor) -> Tensor:
    # As F.linear does: what is no view may be added to in place, whatever it was made under.
    return torch.ops.aten._unsafe_view(out, (*tokens.shape[:-1], out.shape[-1]))


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


def _is_chosen(tokens: Tensor, layer: Layer, impl: str | None) -> bool:
    """Whether the products of such a layer are for `products`."""
    weight, bias = layer
    if is_traced() or not _is_plain(tokens) or not _is_parameters(weight, bias):
        return False
    if not tokens.ndim or tokens.shape[-1] != weight.shape[1] or not tokens.numel():
        return False  # for torch to answer, or to refuse
    if torch.autograd.forward_ad._current_level >= 0 or choose_impl(impl, tokens) != "cpu":
        return False
    if not torch.is_autocast_enabled("cpu"):
        return tokens.dtype == torch.float32
    dtype = torch.get_autocast_dtype("cpu")
    of_autocast = dtype == torch.bfloat16 and tokens.dtype in (torch.float32, dtype)
    return of_autocast and products.serves_bfloat16(tokens.numel() // tokens.shape[-1])


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_neg()
    return strided and type(tensor) in (Tensor, nn.Parameter)


def _is_parameters(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are a layer's, in float32."""
    if not all(_is_plain(t) and t.dtype == torch.float32 for t in (weight, bias) if t is not None):
        return False
    return weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])


def _follows(first: Layer, second: Layer) -> bool:
    """Whether a layer like the first one takes what that gives."""
    return _is_parameters(*second) and second[0].shape[1] == first[0].shape[0] > 0


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with_rows, with_weight, _ = ctx.needs_input_grad
        ctx.ways = ways = _ways(rows, weight)
        operand = products.operand(ways.output, weight, rows.dtype)
        kept = _kept(ways, weight, operand, rows.dtype)
        ctx.save_for_backward(rows if with_weight else None, kept if with_rows else None)
        return products.output(ways.output, rows, operand, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> _Gradients:
        rows, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # a backward pass may be called inside
            return _gradients(ctx.ways, out_gradient, rows, weight, ctx.needs_input_grad[2])


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
        ctx.ways, ctx.dropout_p = (_ways(rows, weight), _ways(rows, second_weight)), ending[0]
        operands = [
            products.operand(ways.output, each, rows.dtype)
            for ways, each in zip(ctx.ways, (weight, second_weight), strict=True)
        ]
        hidden = products.output(ctx.ways[0].output, rows, operands[0], bias, ending)
        into_first = with_rows or with_weight or with_bias
        ctx.save_for_backward(
            rows if with_weight else None,
            _kept(ctx.ways[0], weight, operands[0], rows.dtype) if with_rows else None,
            hidden if into_first or with_second else None,
            _kept(ctx.ways[1], second_weight, operands[1], rows.dtype) if into_first else None,
        )
        return products.output(ctx.ways[1].output, hidden, operands[1], second_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, hidden, second_weight = ctx.saved_tensors
        _, _, with_bias, with_second, with_second_bias = ctx.needs_input_grad[:5]
        first, second = ctx.ways
        with torch.autocast("cpu", enabled=False):  # a backward pass may be called inside
            gradients: _Gradients = None, None, None
            if second_weight is not None:
                gradient = _hidden_gradient(second, out_gradient, second_weight, hidden, ctx.dropout_p)
                gradients = _gradients(first, gradient, rows, weight, with_bias)
            of_second = _gradients(second, out_gradient, hidden if with_second else None, None, with_second_bias)
        return *gradients, *of_second[1:], None, None


def _hidden_gradient(
    ways: products.Ways, out_gradient: Tensor, weight: Tensor, hidden: Tensor, dropout_p: float
) -> Tensor:
    """Of what was before ReLU and dropout, which gave `hidden`: it was multiplied by the weight."""
    if _is_torchs(out_gradient):
        return torch.mm(out_gradient, weight.to(out_gradient.dtype)) * ((hidden > 0) / (1 - dropout_p))
    return products.token_gradient(ways.token_gradient, out_gradient, weight, (dropout_p, None), hidden)


def _gradients(
    ways: products.Ways, out_gradient: Tensor, rows: Tensor | None, weight: Tensor | None, with_bias: bool
) -> _Gradients:
    """Of a layer's rows where there is `weight`, of weight where there are `rows`, and of bias."""
    rows_gradient, weight_gradient, bias_gradient = None, None, None
    if _is_torchs(out_gradient):
        ways = products.Ways(*(products.TORCH,) * len(ways))
        weight = None if weight is None else weight.to(out_gradient.dtype)
    if weight is not None:
        rows_gradient = products.token_gradient(ways.token_gradient, out_gradient, weight)
    if rows is not None:
        weight_gradient, bias_gradient = products.weight_gradient(ways.weight_gradient, rows, out_gradient, with_bias)
    elif with_bias:
        bias_gradient = out_gradient.sum(0, dtype=torch.float32)
    return rows_gradient, weight_gradient, bias_gradient


def _is_torchs(out_gradient: Tensor) -> bool:
    """Whether a gradient is many at once, or moves: no kernel can be handed it."""
    return without_memory(out_gradient) or torch.autograd.forward_ad._current_level >= 0


def _output(rows: Tensor, weight: Tensor, bias: Tensor | None, ending: products.ReluDropout | None = None) -> Tensor:
    way = _ways(rows, weight).output
    return products.output(way, rows, products.operand(way, weight, rows.dtype), bias, ending)


def _kept(ways: products.Ways, weight: Tensor, operand: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight for the gradient of tokens, of which `operand` was for the output."""
    if ways.token_gradient == products.OWN:
        return weight
    return operand if operand.dtype == dtype else products.operand(ways.token_gradient, weight, dtype)


def _ways(rows: Tensor, weight: Tensor) -> products.Ways:
    return products.fastest(rows.shape[0], weight.shape[1], weight.shape[0], rows.dtype)
