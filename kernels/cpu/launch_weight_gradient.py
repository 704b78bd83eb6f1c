"""From a linear layer's tokens and gradient on a CPU to the C++ kernel for its weight and bias."""

import ctypes

import torch
from torch import Tensor

from ..layout import unit_last_stride
from .build import load

__all__ = ["has_tiles", "weight_gradient"]


class _Layer(ctypes.Structure):
    """`Layer` of weight_gradient.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "ins", "outs", "token_stride", "gradient_stride")]


def has_tiles() -> bool:
    """Whether this process may multiply bfloat16 by tiles (AMX), which the kernel needs."""
    return bool(load().uniad_has_tiles())


def weight_gradient(tokens: Tensor, gradient: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """(gradient^T tokens [O, I], gradient summed over rows [O] or None) in float32.

    tokens [R, I] and gradient [R, O] in bfloat16.

    Raises:
        RuntimeError: this process has no tiles.
        ValueError: a tensor is in another dtype.
    """
    if tokens.dtype != torch.bfloat16 or gradient.dtype != torch.bfloat16:
        raise ValueError(f"tokens and gradient must be in bfloat16, got {tokens.dtype} and {gradient.dtype}")
    if not has_tiles():  # asking is what makes the system give them
        raise RuntimeError("the kernel for a weight's gradient needs AMX, which this process does not have")
    tokens, gradient = unit_last_stride(tokens), unit_last_stride(gradient)
    (rows, ins), outs = tokens.shape, gradient.shape[1]
    weight = torch.empty(outs, ins, dtype=torch.float32, device="cpu")
    bias = torch.empty(outs, dtype=torch.float32, device="cpu") if with_bias else None
    load().uniad_weight_gradient(
        ctypes.byref(_Layer(rows, ins, outs, tokens.stride(0), gradient.stride(0))),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (tokens, gradient, weight, bias)),
    )
    return weight, bias
