"""The 2D neighbourhood on a token grid: which keys a query does not see.

Tokens are numbered row by row: token i sits at row i // width, col i % width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec

import torch
from torch import Tensor

Size = tuple[int, int]
_Arguments = ParamSpec("_Arguments")


def _kept_outside_of_tracing(make: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """`make`, whose last results are kept; under any tracer or mode of torch it is called, and nothing is kept.

    What it makes there may be a stand-in of the tracer's, of no use afterwards.
    """
    kept = lru_cache(maxsize=8)(make)

    def get(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        function: Callable[_Arguments, Tensor] = make if is_traced() else kept  # type: ignore[assignment]
        return function(*args, **kwargs)

    return get


def is_traced() -> bool:
    """Whether tensors made now may be stand-ins: under torch.compile, export, jit, func, a mode or a captured graph."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def neighborhood_radius(neighbor_size: Size | None) -> Size:
    """(row, col) radius of a window: key j is hidden from query i when both distances are within it.

    An even size n acts as n + 1, as in the public code. (-1, -1), which hides nothing, for None.
    """
    if neighbor_size is None:
        return -1, -1
    height, width = neighbor_size
    return height // 2, width // 2


def has_query_without_key(feature_size: Size, neighbor_size: Size | None) -> bool:
    """Whether the window covers the whole grid for some query (the one in the middle, then)."""
    radius_row, radius_col = neighborhood_radius(neighbor_size)
    height, width = feature_size
    return radius_row >= height // 2 and radius_col >= width // 2


def hidden_keys(feature_size: Size, neighbor_size: Size | None, device: torch.device) -> Tensor:
    """The mask itself: bool [N, N] for N = height * width, True where query (row) i must not see key (col) j."""
    near = []
    for size, radius in zip(feature_size, neighborhood_radius(neighbor_size), strict=True):
        position = torch.arange(size, device=device)
        near.append((position[:, None] - position).abs() <= radius)
    near_row, near_col = near
    tokens = feature_size[0] * feature_size[1]
    return (near_row[:, None, :, None] & near_col[None, :, None, :]).reshape(tokens, tokens)


@_kept_outside_of_tracing
def additive_mask(feature_size: Size, neighbor_size: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[N, N] in `dtype`, 0 where the key is seen and -inf where hidden; made once and kept.

    A query left with no key sees all of them here, since a softmax over nothing is NaN: what such a query
    returns is for the caller to overwrite (see `queries_with_keys`).
    """
    hidden = hidden_keys(feature_size, neighbor_size, device)
    hidden = hidden & ~hidden.all(dim=1, keepdim=True)
    # A tensor made inside inference_mode could not be saved for a later backward.
    with torch.inference_mode(False):
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill(hidden.clone(), float("-inf"))


@_kept_outside_of_tracing
def queries_with_keys(feature_size: Size, neighbor_size: Size, device: torch.device) -> Tensor:
    """bool [N, 1], True where the query sees at least one key."""
    with torch.inference_mode(False):
        return ~hidden_keys(feature_size, neighbor_size, device).all(dim=1, keepdim=True)
