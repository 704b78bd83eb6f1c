"""Dropout alone, with ReLU, and with the residual and LayerNorm after it: public ops, gradients, operators."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference, torch_impl
from .checks import autocasted, check_same_kind, checked_dropout_p, checked_seed, seed_of, seed_tensor
from .dispatch import choose_impl, launchers
from .tracing import without_memory


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
        seed: of the dropout, see `uniad_fast.ops.neighbor_masked_attention`.
        impl: implementation, see `uniad_fast.ops.neighbor_masked_attention`.

    Returns:
        [B, ..., C] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices, probability or impl are not as above.
    """
    x, residual = autocasted(x, residual)
    _check_norm(x, residual, weight, bias)
    eps = float(eps)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    dropout_p, seed, impl = checked(x, dropout_p, seed, impl)
    if impl == "torch":
        return torch_impl.dropout_add_norm(x, residual, weight, bias, dropout_p, eps, seed)
    if impl == "reference":
        return reference.dropout_add_norm(x, residual, weight, bias, dropout_p, eps, seed)
    tensors = (_rows(x), _rows(residual), weight.float(), bias.float())
    arguments = (*tensors, dropout_p, eps, None if seed is None else seed_tensor(seed, x.device))
    if without_memory(*tensors):
        out = norm_forward(*arguments, impl)[0]
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = _Norm.apply(*arguments, impl)
    else:
        out = launchers(impl).norm_forward(*arguments)[0]
    return out.view(x.shape)


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
        dropout_p: probability in [0, 1) that an element is dropped; kept ones are divided by 1 - p.
        seed, impl: as in `dropout_add_norm`.

    Returns:
        The shape and dtype of `x`; `x` itself where there is nothing to do.

    Raises:
        ValueError: the dtype, the probability or impl are not as above.
    """
    check_same_kind(x=x)
    if x.ndim < 1:
        raise ValueError(f"x must be [..., C], got {tuple(x.shape)}")
    dropout_p, seed, impl = checked(x, dropout_p, seed, impl)
    if dropout_p == 0 and not relu:
        return x
    if impl == "torch":
        return torch_impl.dropout(x, dropout_p, relu, seed)
    if impl == "reference":
        return reference.dropout(x, dropout_p, relu, seed)
    arguments = (_rows(x), dropout_p, relu, None if seed is None else seed_tensor(seed, x.device))
    if without_memory(x):
        out = dropout_forward(*arguments, impl)
    elif torch.is_grad_enabled() and x.requires_grad:
        out = _Dropout.apply(*arguments, impl)
    else:
        out = launchers(impl).dropout_forward(*arguments)
    return out.view(x.shape)


def _check_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_same_kind(x=x, residual=residual)
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


def checked(
    x: Tensor, dropout_p: float, seed: int | Tensor | None, impl: str | None
) -> tuple[float, int | Tensor | None, str]:
    """The probability that acts, the seed that it needs (None without dropout), and the implementation for x."""
    dropout_p = checked_dropout_p(dropout_p)
    seed = checked_seed(seed, x.device)
    impl = choose_impl(impl, x)
    if dropout_p == 0:
        return dropout_p, None, impl
    return dropout_p, seed_of(seed, x.device, math.prod(x.shape[1:-1]), impl), impl


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] -> [R, C]; C may be 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class _Norm(torch.autograd.Function):
    """Eager code calls the launchers directly, without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> Tensor:
        ctx.dropout_p, eps, seed, ctx.impl = arguments
        out, stats = launchers(ctx.impl).norm_forward(x, residual, weight, bias, ctx.dropout_p, eps, seed)
        ctx.save_for_backward(x, residual, weight, stats, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        gradients = launchers(ctx.impl).norm_backward(out_gradient, *tensors, ctx.dropout_p, seed)
        return *gradients, None, None, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout_p: float, relu: bool, seed: Tensor | None, impl: str) -> Tensor:
        out = launchers(impl).dropout_forward(x, dropout_p, relu, seed)
        ctx.save_for_backward(out if relu else None, seed)
        ctx.arguments, ctx.impl = (dropout_p, relu), impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        out, seed = ctx.saved_tensors
        out = out_gradient if out is None else out  # not read without ReLU, but for its shape
        gradient = launchers(ctx.impl).dropout_backward(out_gradient, out, *ctx.arguments, seed)
        return gradient, None, None, None, None


@torch.library.custom_op("uniad_fast::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor,
    dropout_p: float, eps: float, seed: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launchers' `norm_forward` as an operator."""
    return launchers(impl).norm_forward(x, residual, weight, bias, dropout_p, eps, seed)


@norm_forward.register_fake
def _(x: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 2, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::norm_backward", mutates_args=())
def norm_backward(
    out_gradient: Tensor, x: Tensor, residual: Tensor, weight: Tensor, stats: Tensor,
    dropout_p: float, seed: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The launchers' `norm_backward` as an operator."""
    gradients = launchers(impl).norm_backward(out_gradient, x, residual, weight, stats, dropout_p, seed)
    return *gradients[:2], gradients[2].clone(), gradients[3].clone()  # no two of an operator's may share memory


@norm_backward.register_fake
def _(out_gradient: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(residual.shape), *(torch.empty_like(weight) for _ in range(2))


def _save_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, ctx.dropout_p, _, seed, ctx.impl = inputs
    ctx.save_for_backward(x, residual, weight, output[1], seed)


def _norm_gradients(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = norm_backward(out_gradient, *tensors, ctx.dropout_p, seed, ctx.impl)
    return *gradients, None, None, None, None


norm_forward.register_autograd(_norm_gradients, setup_context=_save_norm)


@torch.library.custom_op("uniad_fast::dropout_forward", mutates_args=())
def dropout_forward(x: Tensor, dropout_p: float, relu: bool, seed: Tensor | None, impl: str) -> Tensor:
    """The launchers' `dropout_forward` as an operator."""
    return launchers(impl).dropout_forward(x, dropout_p, relu, seed)


@dropout_forward.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("uniad_fast::dropout_backward", mutates_args=())
def dropout_backward(
    out_gradient: Tensor, out: Tensor, dropout_p: float, relu: bool, seed: Tensor | None, impl: str
) -> Tensor:
    """The launchers' `dropout_backward` as an operator."""
    return launchers(impl).dropout_backward(out_gradient, out, dropout_p, relu, seed)


@dropout_backward.register_fake
def _(out_gradient: Tensor, out: Tensor, *_rest: Any) -> Tensor:
    return out.new_empty(out.shape)


def _save_dropout(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *ctx.arguments, seed, ctx.impl = inputs
    ctx.save_for_backward(output, seed)


def _dropout_gradients(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    out, seed = ctx.saved_tensors
    return dropout_backward(out_gradient, out, *ctx.arguments, seed, ctx.impl), None, None, None, None


dropout_forward.register_autograd(_dropout_gradients, setup_context=_save_dropout)
