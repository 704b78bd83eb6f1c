"""Calling a child module, or doing its work with what it holds: only where nobody could tell the difference.

The network does several layers' work in one pass, and reads their parameters to do so. What people do to modules would
then be lost without a word: hooks, pruning, parametrisations, quantised or adapted layers put in their place. So a
child that is not just what torch made it is called.
"""

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _all_modules
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.linear import linear

_GLOBAL_HOOKS = [n for n in vars(_all_modules) if n.startswith("_global_") and n.endswith("_hooks")]
_Module = TypeVar("_Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling `module` does what its class `kind` says and nothing else, so that its parameters tell it all."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not any(getattr(_all_modules, name) for name in _GLOBAL_HOOKS)
        and all(p is None or type(p) in (nn.Parameter, Tensor) for p in module._parameters.values())
    )


def apply_linear(module: nn.Module, tokens: Tensor, impl: str | None) -> Tensor:
    """module(tokens) of a linear layer, [..., C_in] -> [..., C_out]."""
    if is_plain(module, nn.Linear) or is_plain(module, NonDynamicallyQuantizableLinear):
        return linear(tokens, module.weight, module.bias, impl)
    return module(tokens)


def whole_table(module: Any, rows: int, device: torch.device | None = None) -> Tensor:
    """Every row of an embedding of so many, [rows, C]; one that has to be called is asked on this device."""
    if is_plain(module, nn.Embedding) and module.max_norm is None:
        return module.weight
    if device is None:
        device = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), None)
    return module(torch.arange(rows, device=device))


def pending_dropout(module: nn.Module, tokens: Tensor) -> tuple[Tensor, float]:
    """(tokens, the probability with which `module` still has to drop their elements): 0 where it was called."""
    if is_plain(module, nn.Dropout):
        return tokens, module.p if module.training else 0.0
    return module(tokens), 0.0


def call_attention(module: Callable[..., tuple[Tensor, object]], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Output of any attention module called as `nn.MultiheadAttention` is, batch first whatever its own order.

    query [B or 1, N, C], key and value [B, N, C] -> [B, N, C].
    """
    if query.shape[0] != key.shape[0]:  # one tensor stays one tensor, which is then projected once
        query = query.expand(key.shape[0], -1, -1)
    if getattr(module, "batch_first", True):
        return module(query, key, value)[0]
    turned = {id(tensor): tensor.transpose(0, 1) for tensor in (query, key, value)}
    return module(turned[id(query)], turned[id(key)], turned[id(value)])[0].transpose(0, 1)
