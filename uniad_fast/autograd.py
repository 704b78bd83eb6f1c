"""torch.autograd.Functions over the kernels: save, call, no mathematics.

Eager code calls the launchers directly. Under torch.compile and torch.export they are reached through operators
registered with torch.library, which tracing keeps whole: see `registered`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import registered
from .neighborhood import Size, neighborhood_radius


def neighbor_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_size: Size,
    neighbor_size: Size | None,
    dropout_p: float,
    scale: float,
    seed: Tensor | None,
) -> Tensor:
    """As `reference.neighbor_masked_attention`, by the Triton kernels; the seed is a 0-d int64 tensor on the device."""
    arguments = (*feature_size, *neighborhood_radius(neighbor_size), dropout_p, scale)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(query, key, value, seed, arguments)
    return _attention_forward()(query, key, value, seed, *arguments)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, arguments: tuple) -> Tensor:
        out, log_sum_exp = _attention_forward()(query, key, value, seed, *arguments)
        ctx.save_for_backward(query, key, value, out, log_sum_exp, seed)
        ctx.arguments = arguments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum_exp, seed = ctx.saved_tensors
        backward = registered.attention_backward if torch.compiler.is_compiling() else registered.launch().attention_backward
        gradients = backward(out_gradient, query, key, value, out, log_sum_exp, seed, *ctx.arguments)
        return *gradients, None, None


def _attention_forward() -> Any:
    return registered.attention_forward if torch.compiler.is_compiling() else registered.launch().attention_forward
