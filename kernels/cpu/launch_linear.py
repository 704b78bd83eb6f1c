"""From a linear layer's tensors on a CPU to the C++ kernels for its products in float32."""

import ctypes

import torch
from torch import Tensor

from ..layout import contiguous, unit_last_stride
from .build import load

__all__ = ["output", "token_gradient", "weight_gradient"]


class _Layer(ctypes.Structure):
    """`Layer` of linear.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "ins", "outs", "token_stride", "gradient_stride")]


def output(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """tokens [R, I] times weight [O, I], plus bias [O]: [R, O], float32.

    Raises:
        ValueError: the tensors are not float32, or do not fit each other.
    """
    _check({"RI": tokens, "OI": weight} | ({} if bias is None else {"O": bias}))
    tokens, weight = unit_last_stride(tokens), contiguous(weight)
    bias = None if bias is None else contiguous(bias)
    out = _floats(tokens.shape[0], weight.shape[0])
    if out.numel():
        layer = _Layer(*tokens.shape, weight.shape[0], tokens.stride(0), 0)
        _call(load().uniad_linear_output, layer, tokens, weight, bias, out)
    return out


def token_gradient(out_gradient: Tensor, weight: Tensor) -> Tensor:
    """out_gradient [R, O] times weight [O, I]: [R, I], float32.

    Raises:
        ValueError: the tensors are not float32, or do not fit each other.
    """
    _check({"RO": out_gradient, "OI": weight})
    out_gradient, weight = unit_last_stride(out_gradient), contiguous(weight)
    (rows, outs), ins = out_gradient.shape, weight.shape[1]
    gradient = _floats(rows, ins)
    if gradient.numel():
        layer = _Layer(rows, ins, outs, 0, out_gradient.stride(0))
        _call(load().uniad_linear_token_gradient, layer, out_gradient, weight, gradient)
    return gradient


def weight_gradient(tokens: Tensor, out_gradient: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(out_gradient^T tokens [O, I], out_gradient summed over rows [O] or None), float32.

    tokens [R, I] and out_gradient [R, O].

    Raises:
        ValueError: the tensors are not float32, or do not fit each other.
    """
    _check({"RI": tokens, "RO": out_gradient})
    tokens, out_gradient = unit_last_stride(tokens), unit_last_stride(out_gradient)
    (rows, ins), outs = tokens.shape, out_gradient.shape[1]
    weight, bias = _floats(outs, ins), _floats(outs) if with_bias else None
    layer = _Layer(rows, ins, outs, tokens.stride(0), out_gradient.stride(0))
    _call(load().uniad_linear_weight_gradient, layer, tokens, out_gradient, weight, bias)
    return weight, bias


def _check(tensors: dict[str, Tensor]) -> None:
    """ValueError unless each is float32 and has the axes of its name, of one length wherever an axis has one letter."""
    sizes: dict[str, int] = {}
    for axes, tensor in tensors.items():
        fits = tensor.dtype == torch.float32 and tensor.ndim == len(axes)
        if not fits or any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, tensor.shape, strict=True)):
            got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors.values())
            raise ValueError(f"a product needs float32 of shapes {', '.join(tensors)}, got {got}")


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _call(function: ctypes._CFuncPtr, layer: _Layer, *tensors: Tensor | None) -> None:
    function(ctypes.byref(layer), *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors))
