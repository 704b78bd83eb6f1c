"""The kernels as operators of torch.library, for torch.compile and torch.export: launcher, fake, nothing else."""

from types import ModuleType

import torch
from torch import Tensor


def launch() -> ModuleType:
    """The launchers; Triton is imported by the first call that needs it."""
    from .kernels import launch

    return launch


@torch.library.custom_op("uniad_fast::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `uniad_fast.kernels.launch.attention_forward`."""
    return launch().attention_forward(
        query, key, value, seed, height, width, radius_row, radius_col, dropout_p, scale
    )


@attention_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = key.shape
    return _tokens_first(key), key.new_empty(batch * heads, tokens, dtype=torch.float32)


@torch.library.custom_op("uniad_fast::attention_backward", mutates_args=())
def attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `uniad_fast.kernels.launch.attention_backward`."""
    return launch().attention_backward(
        out_gradient, query, key, value, out, log_sum_exp, seed,
        height, width, radius_row, radius_col, dropout_p, scale,
    )  # fmt: skip


@attention_backward.register_fake
def _(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    radius_row: int,
    radius_col: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query_gradient = _tokens_first(key)
    if query.shape[0] != key.shape[0]:
        query_gradient = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
    return query_gradient, _tokens_first(key), _tokens_first(key)


def _tokens_first(key: Tensor) -> Tensor:
    """Shape of `key`, laid out as the launchers lay out what they allocate."""
    return key.new_empty(key.transpose(1, 2).shape).transpose(1, 2)
