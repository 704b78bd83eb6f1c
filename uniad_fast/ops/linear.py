"""The products of a linear layer: float32 on a CPU by what is fastest there (see `products`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import products
from .checks import seed_tensor
from .dispatch import choose_impl, launchers
from .dropout import checked, dropout
from .tracing import is_traced, without_memory


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, impl: str | None) -> Tensor:
    """`torch.nn.functional.linear`; by `products` where `impl` means the CPU kernels and the product is in float32.

    tokens [..., C_in], weight [C_out, C_in], bias [C_out] -> [..., C_out].
    """
    if not _is_chosen(tokens, weight, bias, impl):
        return F.linear(tokens, weight, bias)
    wanted = tokens.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    differentiated = torch.is_grad_enabled() and wanted
    if torch.is_autocast_enabled("cpu"):
        by_tiles = torch.get_autocast_dtype("cpu") == torch.bfloat16 and products.has_onednn() and _has_tiles()
        if not (differentiated and by_tiles):
            return F.linear(tokens, weight, bias)
        product, tokens = _LinearInTiles.apply, tokens.to(torch.bfloat16)
    else:
        product = _Linear.apply if differentiated else _output
    flat = tokens.reshape(-1, tokens.shape[-1])
    out = product(flat, weight, bias)
    # As F.linear does: what is no view may be added to in place, whatever it was made under.
    return torch.ops.aten._unsafe_view(out, (*tokens.shape[:-1], weight.shape[0]))


def linear_relu_dropout(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, impl: str | None
) -> Tensor:
    """dropout(relu(`linear`)), which where both are ours is one tensor instead of two: the product is nobody else's.

    tokens [..., C_in], weight [C_out, C_in], bias [C_out] -> [..., C_out]. The noise is that of `dropout`.
    """
    wanted = tokens.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    together = torch.is_grad_enabled() and wanted and tokens.ndim > 1 and not torch.is_autocast_enabled("cpu")
    if not (together and _is_chosen(tokens, weight, bias, impl)):
        return dropout(linear(tokens, weight, bias, impl), dropout_p, relu=True, impl=impl)
    dropout_p, seed, impl = checked(tokens, dropout_p, None, impl)
    flat = tokens.reshape(-1, tokens.shape[-1])
    out = _LinearReluDropout.apply(
        flat, weight, bias, dropout_p, None if seed is None else seed_tensor(seed, tokens.device)
    )
    return torch.ops.aten._unsafe_view(out, (*tokens.shape[:-1], weight.shape[0]))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """rows [R, K] times weight [O, K], plus bias [O]: [R, O], into `out` if there is one; no gradient is recorded."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def add_product(total: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """total [R, O] with the product of rows [R, K] and weight [O, K] added in place; no gradient is recorded."""
    return total.addmm_(rows, weight.t())


def _is_chosen(tokens: Tensor, weight: Tensor, bias: Tensor | None, impl: str | None) -> bool:
    if is_traced():
        return False
    for tensor in (tokens, weight, *([] if bias is None else [bias])):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_neg():
            return False
        if tensor.dtype != torch.float32 and not (tensor is tokens and _is_autocasts(tensor)):
            return False
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
    if not tokens.ndim or weight.ndim != 2 or tokens.shape[-1] != weight.shape[1] or not tokens.numel():
        return False  # for torch to answer, or to refuse
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return choose_impl(impl, tokens) == "cpu"


def _is_autocasts(tensor: Tensor) -> bool:
    """Whether it is in the dtype that autocast casts to."""
    return torch.is_autocast_enabled("cpu") and tensor.dtype == torch.get_autocast_dtype("cpu")


def _has_tiles() -> bool:
    from ..kernels.cpu import launch_weight_gradient

    return launch_weight_gradient.has_tiles()


class _LinearInTiles(torch.autograd.Function):
    """rows [R, K] in bfloat16, weight and bias in float32 -> bfloat16, as autocast has it; their gradients come in
    float32, without a rounding between.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(torch.bfloat16)
        ctx.save_for_backward(rows, cast)
        return products.onednn(rows, cast, None if bias is None else bias.to(torch.bfloat16))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from ..kernels.cpu import launch_weight_gradient

        rows, weight = ctx.saved_tensors
        with_rows, with_weight, with_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):  # a backward pass may be called inside
            rows_gradient = torch.mm(out_gradient, weight) if with_rows else None
        weight_gradient, bias_gradient = None, None
        if with_weight and without_memory(out_gradient):
            weight_gradient = torch.mm(out_gradient.float().t(), rows.float())
            bias_gradient = out_gradient.sum(0, dtype=torch.float32) if with_bias else None
        elif with_weight:
            weight_gradient, bias_gradient = launch_weight_gradient.weight_gradient(rows, out_gradient, with_bias)
        elif with_bias:
            bias_gradient = out_gradient.sum(0, dtype=torch.float32)
        return rows_gradient, weight_gradient, bias_gradient


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with_rows, with_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if with_weight else None, weight if with_rows else None)
        ctx.ways = _ways(rows, weight)
        return products.output(ctx.ways.output, rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> _Gradients:
        return _gradients(ctx, out_gradient, *ctx.saved_tensors)


class _LinearReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        with_rows, with_weight, *_ = ctx.needs_input_grad
        ctx.ways, ctx.dropout_p = _ways(rows, weight), dropout_p
        out = products.output(ctx.ways.output, rows, weight, bias)
        # oneDNN's may lie in an order of its own.
        out = launchers("cpu").relu_dropout_in_place(out.contiguous(), dropout_p, seed)
        ctx.save_for_backward(rows if with_weight else None, weight if with_rows else None, out, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, out, seed = ctx.saved_tensors
        if without_memory(out_gradient) or torch.autograd.forward_ad._current_level >= 0:
            gradient = out_gradient * ((out > 0) / (1 - ctx.dropout_p))
        else:
            gradient = launchers("cpu").dropout_backward(out_gradient, out, ctx.dropout_p, True, seed)
        return *_gradients(ctx, gradient, rows, weight), None, None


def _gradients(ctx: Any, out_gradient: Tensor, rows: Tensor | None, weight: Tensor | None) -> _Gradients:
    """Of a layer's rows, weight and bias, those that are wanted."""
    with_bias = ctx.needs_input_grad[2]
    ways = ctx.ways
    if without_memory(out_gradient) or torch.autograd.forward_ad._current_level >= 0:
        ways = products.Ways(*(products.TORCH,) * len(ways))
    rows_gradient, weight_gradient, bias_gradient = None, None, None
    with torch.autocast("cpu", enabled=False):  # a backward pass may be called inside
        if weight is not None:
            rows_gradient = products.token_gradient(ways.token_gradient, out_gradient, weight)
        if rows is not None:
            weight_gradient, bias_gradient = products.weight_gradient(
                ways.weight_gradient, rows, out_gradient, with_bias
            )
        elif with_bias:
            bias_gradient = out_gradient.sum(0)
    return rows_gradient, weight_gradient, bias_gradient


def _output(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return products.output(_ways(rows, weight).output, rows, weight, bias)


def _ways(rows: Tensor, weight: Tensor) -> products.Ways:
    return products.fastest(rows.shape[0], weight.shape[1], weight.shape[0])
