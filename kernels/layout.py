"""What the launchers of both kinds share: layouts, thresholds of the noise, and sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

Window = Sequence[int]
"""(height, width, radius_row, radius_col): the token grid, and how far a query hides keys on it, -1 for not at all."""


Into = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Where the gradients of an attention's query (not of batch 1), key and value go: views [B, H, N, D] of the caller's,
the last two of the same strides; None for a new tensor."""
NOWHERE: Into = (None, None, None)

ReluDropout = tuple[float, Tensor | None]
"""ReLU and dropout at the end of a product: the probability, and the noise's seed, None where nothing is dropped."""


def keep_threshold(dropout_p: float) -> int:
    """An element whose 16 random bits are below it is dropped."""
    return round(dropout_p * 65536)


def jitter_threshold(prob: float) -> int:
    """A token whose 24 random bits are below it is jittered."""
    return round(prob * 2**24)


def noise_numbers(seed: Tensor | None) -> tuple[int, int]:
    """(key of the noise, number of the first plane, row or token in it) of a seed [] or [2]; waits for a GPU's."""
    if seed is None:
        return 0, 0
    return (int(seed), 0) if seed.ndim == 0 else tuple(seed.tolist())


def ceil_div(count: int, size: int) -> int:
    """Blocks of that size that hold so many. Triton's own is wrapped for its compiler, and takes microseconds here."""
    return -(-count // size)


def like_tokens_first(key: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty [B, H, N, D] laid out as [B, N, H, D]: merging the heads for the output projection is then a view."""
    batch, heads, tokens, head_dim = key.shape
    storage = torch.empty(batch, tokens, heads, head_dim, dtype=dtype or key.dtype, device=key.device)
    return storage.transpose(1, 2)


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only where neighbouring channels are not neighbours in memory."""
    tensor = _in_memory(tensor)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor as its own memory has it, row by row: copied where it is strided, expanded or lazily negated."""
    return _in_memory(tensor).contiguous()


def _in_memory(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: torch keeps some negations, and some zeros, as a mark alone."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def summed_over_batch(gradient: Tensor, residual: Tensor) -> Tensor:
    """Gradient [R, C] to the residual's [R', C]: over rows that meet one of its, in float32, in torch's fixed order."""
    if gradient.shape == residual.shape:
        return gradient
    return gradient.view(-1, *residual.shape).sum(0)  # which adds halves in float32
