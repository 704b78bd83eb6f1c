"""Features of many images, [images, N, C], wherever they are: in memory, in files, or yet to be extracted."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class TokenRows(Protocol):
    """Reads like an array [images, N, C] of float32. An array is one; others read what is asked for, and no more."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """By a number [N, C], or by a slice, numbers or a mask [rows, N, C]."""


def begin_reading(tokens: TokenRows, rows: NDArray) -> Callable[[], NDArray]:
    """Begin to read rows on another thread, where `tokens` knows how to; what is called later for them waits."""
    begin = getattr(tokens, "begin_reading", None)
    return (lambda: np.asarray(tokens[rows])) if begin is None else begin(rows)


def row_numbers(rows: Any, count: int) -> NDArray:
    """A slice, numbers or a mask as numbers from 0 to count - 1, int64; IndexError beyond."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count))
    numbers = np.asarray(rows)
    if numbers.dtype == bool:
        if numbers.shape != (count,):
            raise IndexError(f"a mask of {numbers.shape} for {count} rows")
        return np.flatnonzero(numbers)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise IndexError(f"rows are numbers, a mask or a slice, got {numbers.dtype}")
    numbers = numbers.astype(np.int64).reshape(-1)
    if numbers.size and not (-count <= numbers.min() and numbers.max() < count):
        raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {count}")
    return np.where(numbers < 0, numbers + count, numbers)
