"""The products of a linear layer on a CPU, by what is fastest there (see `products`), and what is torch's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import products
from .dispatch import choose_impl
from .tracing import is_traced, without_memory

Layer = tuple[Tensor, Tensor | None]
"""Weight [C_out, C_in] and bias [C_out] of a linear layer."""


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, impl: str | None) -> Tensor:
    """`torch.nn.functional.linear`; by `products` where `impl` means the CPU kernels and parameters are float32.

    Under autocast to bfloat16 a bias is not rounded to it where the product is ours, nor are parameters' gradients.

    tokens [..., C_in], weight [C_out, C_in], bias [C_out] -> [..., C_out].
    """
    if not is_chosen(tokens, (weight, bias), impl):
        return F.linear(tokens, weight, bias)
    rows = as_rows(tokens)
    out = (
        _Linear.apply(rows, weight, bias) if is_differentiated(tokens, weight, bias) else output_of(rows, weight, bias)
    )
    return unflattened(out, tokens)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """rows [R, K] times weight [O, K], plus bias [O]: [R, O], into `out` if there is one; no gradient is recorded."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def add_product(total: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """total [R, O] with the product of rows [R, K] and weight [O, K] added in place; no gradient is recorded."""
    return total.addmm_(rows, weight.t())


def as_rows(tokens: Tensor) -> Tensor:
    """[..., C] -> [R, C], in the dtype that autocast gives them."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    return rows.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else rows


def unflattened(out: Tensor, tokens: Tensor) -> Tensor:
    # As F.linear does: what is no view may be added to in place, whatever it was made under.
    return torch.ops.aten._unsafe_view(out, (*tokens.shape[:-1], out.shape[-1]))


def is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


def is_chosen(tokens: Tensor, layer: Layer, impl: str | None) -> bool:
    """Whether the products of such a layer are for `products`."""
    weight, bias = layer
    if is_traced() or not _is_plain(tokens) or not are_parameters(weight, bias):
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


def are_parameters(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are a layer's, in float32, with inputs and outputs."""
    if not all(_is_plain(t) and t.dtype == torch.float32 for t in (weight, bias) if t is not None):
        return False
    return weight.ndim == 2 and weight.numel() > 0 and (bias is None or bias.shape == weight.shape[:1])


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with_rows, with_weight, _ = ctx.needs_input_grad
        ctx.ways = ways = ways_of(rows, weight)
        operand = products.operand(ways.output, weight, rows.dtype)
        kept = kept_weight(ways, weight, operand, rows.dtype) if with_rows else None
        ctx.save_for_backward(rows if with_weight else None, kept)
        return products.output(ways.output, rows, operand, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> Gradients:
        rows, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # a backward pass may be called inside
            return gradients_of(ctx.ways, out_gradient, rows, weight, ctx.needs_input_grad[2])


def gradients_of(
    ways: products.Ways, out_gradient: Tensor, rows: Tensor | None, weight: Tensor | None, with_bias: bool
) -> Gradients:
    """Of a layer's rows where there is `weight`, of weight where there are `rows`, and of bias."""
    rows_gradient, weight_gradient, bias_gradient = None, None, None
    if is_torchs(out_gradient):
        ways = products.Ways(*(products.TORCH,) * len(ways))
        weight = None if weight is None else weight.to(out_gradient.dtype)
    if weight is not None:
        rows_gradient = products.token_gradient(ways.token_gradient, out_gradient, weight)
    if rows is not None:
        weight_gradient, bias_gradient = products.weight_gradient(ways.weight_gradient, rows, out_gradient, with_bias)
    elif with_bias:
        bias_gradient = out_gradient.sum(0, dtype=torch.float32)
    return rows_gradient, weight_gradient, bias_gradient


def is_torchs(out_gradient: Tensor) -> bool:
    """Whether a gradient is many at once, or moves: no kernel can be handed it."""
    return without_memory(out_gradient) or torch.autograd.forward_ad._current_level >= 0


def output_of(
    rows: Tensor, weight: Tensor, bias: Tensor | None, ending: "products.ReluDropout | None" = None
) -> Tensor:
    way = ways_of(rows, weight).output
    return products.output(way, rows, products.operand(way, weight, rows.dtype), bias, ending)


def kept_weight(ways: products.Ways, weight: Tensor, operand: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight for the gradient of tokens, of which `operand` was for the output."""
    if ways.token_gradient == products.OWN:
        return weight
    return operand if operand.dtype == dtype else products.operand(ways.token_gradient, weight, dtype)


def ways_of(rows: Tensor, weight: Tensor) -> products.Ways:
    return products.fastest(rows.shape[0], weight.shape[1], weight.shape[0], rows.dtype)
