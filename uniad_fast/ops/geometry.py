"""The 2D neighbourhood on a token grid: which keys a query does not see.

Tokens are numbered row by row: token i sits at row i // width, col i % width.
"""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from .tracing import is_captured, is_traced

Size = tuple[int, int]
_Arguments = ParamSpec("_Arguments")


def size_pair(name: str, size: Size | Sequence[Any]) -> Size:
    """`size` as a (height, width) tuple of ints >= 1.

    Args:
        name: what the message calls it.

    Raises:
        ValueError: it is none.
    """
    try:
        height, width = (operator.index(n) for n in size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be (height, width), two integers >= 1, got {size!r}")
    return height, width


class Window(NamedTuple):
    """A token grid of height x width, and the window hidden around each query on it.

    Key j is hidden from query i when its row is within `radius_row` and its column within `radius_col`; radii of -1
    hide nothing. It travels whole, from the public op down to the kernels.
    """

    height: int
    width: int
    radius_row: int
    radius_col: int

    @classmethod
    def of(cls, feature_size: Size | Sequence[Any], neighbor_size: Size | Sequence[Any] | None) -> "Window":
        """From (height, width) of the grid and of the hidden window in tokens, None for nothing hidden.

        An even size n acts as n + 1, as in the public code. A window that reaches across the grid hides no more if it
        is larger, and is clipped so that it fits the kernels' integers.

        Raises:
            ValueError: one of them is no pair of integers >= 1.
        """
        height, width = size_pair("feature_size", feature_size)
        if neighbor_size is None:
            return cls(height, width, -1, -1)
        window_height, window_width = size_pair("neighbor_size", neighbor_size)
        return cls(height, width, min(window_height // 2, height), min(window_width // 2, width))

    @property
    def tokens(self) -> int:
        """N, the number of tokens on the grid."""
        return self.height * self.width

    @property
    def feature_size(self) -> Size:
        """(height, width) of the grid."""
        return self.height, self.width

    @property
    def neighbor_size(self) -> Size | None:
        """(height, width) of the hidden window, odd numbers; None for nothing hidden."""
        return None if self.radius_row < 0 else (2 * self.radius_row + 1, 2 * self.radius_col + 1)

    @property
    def reach(self) -> Size:
        """How far (rows, columns) it hides, at most across the grid: windows of one reach hide the same keys."""
        return min(self.radius_row, self.height - 1), min(self.radius_col, self.width - 1)

    @property
    def leaves_a_query_without_key(self) -> bool:
        """Whether it covers the whole grid for some query (the one in the middle, then)."""
        return self.radius_row >= self.height // 2 and self.radius_col >= self.width // 2

    def __str__(self) -> str:
        size = self.neighbor_size
        hidden = "nothing hidden" if size is None else f"{size[0]}x{size[1]} hidden"
        return f"{self.height}x{self.width}, {hidden}"


def hidden_keys(window: Window, device: torch.device) -> Tensor:
    """The mask itself: bool [N, N] for N = height * width, True where query (row) i must not see key (col) j."""
    near = []
    for size, radius in ((window.height, window.radius_row), (window.width, window.radius_col)):
        position = torch.arange(size, device=device)
        near.append((position[:, None] - position).abs() <= radius)
    near_row, near_col = near
    return (near_row[:, None, :, None] & near_col[None, :, None, :]).reshape(window.tokens, window.tokens)


def _kept_outside_of_tracing(make: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """`make`, whose last results are kept; under a tracer, mode or graph of torch's it is called, and nothing is kept.

    What it makes there may be a stand-in of the tracer's, or a graph's own, of no use afterwards.
    """
    kept = lru_cache(maxsize=8)(make)

    def get(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        function: Callable[_Arguments, Tensor] = make if is_traced() or is_captured() else kept  # type: ignore[assignment]
        return function(*args, **kwargs)

    return get


@_kept_outside_of_tracing
def additive_mask(window: Window, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[N, N] in `dtype`, 0 where the key is seen and -inf where hidden; made once and kept.

    A query left with no key sees all of them here, since a softmax over nothing is NaN: what such a query
    returns is for the caller to overwrite (see `queries_with_keys`).
    """
    hidden = hidden_keys(window, device)
    hidden = hidden & ~hidden.all(dim=1, keepdim=True)
    # A tensor made inside inference_mode could not be saved for a later backward.
    with torch.inference_mode(False):
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill(hidden.clone(), float("-inf"))


@_kept_outside_of_tracing
def queries_with_keys(window: Window, device: torch.device) -> Tensor:
    """bool [N, 1], True where the query sees at least one key."""
    with torch.inference_mode(False):
        return ~hidden_keys(window, device).all(dim=1, keepdim=True)
