"""Which images a step trains on, and their features, read ahead while the step before computes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..rows import TokenRows, begin_reading

IN_BLOCKS_ABOVE = 2 << 30
"""Bytes of features in float32 from which on a step's images come from a few blocks, so that a disk reads in order."""
_BLOCK = 32  # images that lie one after the other
_GROUP_BYTES = 128 << 20  # of blocks that are shuffled together
_AHEAD_BYTES = 16 << 20


class Batch(NamedTuple):
    """A step's images: numbers of all of them, and the features [b, N, C] of this process's, from number `first` on."""

    rows: NDArray
    first: int
    tokens: Tensor


class Batches:
    """The batches of a training, by the number of the step; what they are depends on nothing but the arguments.

    An epoch has its own order. That of many features keeps blocks of neighbours together: blocks are shuffled, and then
    the images of some blocks. With `classes`, every class has as many images in an epoch as any other, and those of a
    small one come again.

    Args:
        tokens: [images, N, C].
        batch_size: images of a step, of all processes together.
        part: (number of this process, of how many), which share a batch.
        classes: number of each image's class; None where all images count the same.
    """

    def __init__(
        self,
        tokens: TokenRows,
        batch_size: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
        classes: NDArray | None = None,
    ) -> None:
        self.tokens, self._size, self._seed, self._part, self._classes = tokens, batch_size, seed, part, classes
        self.images = len(tokens)
        self.steps_per_epoch = max(1, self.images // batch_size)
        row_bytes = max(1, int(np.prod(tokens.shape[1:]))) * 4
        self.in_blocks = classes is None and self.images * row_bytes > IN_BLOCKS_ABOVE
        self._group = max(2, min(_GROUP_BYTES // (row_bytes * _BLOCK), 16))  # blocks
        at_once = self._group * _BLOCK if self.in_blocks else _AHEAD_BYTES // row_bytes
        self._window = max(1, min(at_once // batch_size, 64))  # steps whose features are read together
        self._order: tuple[int, NDArray] | None = None
        self._read: tuple[int, list[NDArray], NDArray] | None = None
        self._coming: tuple[int, list[NDArray], Callable[[], NDArray]] | None = None

    def rows(self, step: int) -> NDArray:
        """Numbers of a step's images, rising."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        return np.sort(self._order[1][position * self._size : (position + 1) * self._size])

    def at(self, step: int) -> Batch:
        """A step's batch; begins to read those after it."""
        window = step // self._window
        if self._read is None or self._read[0] != window:
            number, rows, wait = self._begin(window) if self._coming is None else self._coming
            if number != window:
                number, rows, wait = self._begin(window)
            self._read = (number, rows, wait())
            self._coming = self._begin(window + 1)
        _, rows, tokens = self._read
        position = step % self._window
        start = sum(len(own) for own in rows[:position])
        every, first, _ = self.part_of(step)
        return Batch(every, first, torch.from_numpy(tokens[start : start + len(rows[position])]))

    def part_of(self, step: int) -> tuple[NDArray, int, NDArray]:
        """(all of a step's rows, number among them of this process's first one, this process's)."""
        every = self.rows(step)
        first, end = share(len(every), self._part)
        return every, first, every[first:end]

    def _begin(self, window: int) -> tuple[int, list[NDArray], Callable[[], NDArray]]:
        rows = []
        for step in range(window * self._window, (window + 1) * self._window):
            rows.append(self.part_of(step)[2])
        return window, rows, begin_reading(self.tokens, np.concatenate(rows))

    def _order_of(self, epoch: int) -> NDArray:
        draw = np.random.default_rng((self._seed, epoch))
        if self._classes is not None:
            return _balanced(self._classes, self.images, draw)
        if not self.in_blocks:
            return draw.permutation(self.images)
        blocks = draw.permutation(-(-self.images // _BLOCK))
        parts = []
        for start in range(0, len(blocks), self._group):
            rows = (blocks[start : start + self._group, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1)
            parts.append(draw.permutation(rows[rows < self.images]))
        return np.concatenate(parts)


def share(count: int, part: tuple[int, int]) -> tuple[int, int]:
    """(first, last + 1) of `count` things that are the part's, one of so many that differ by one at most."""
    number, parts = part
    return number * count // parts, (number + 1) * count // parts


def _balanced(classes: NDArray, images: int, draw: np.random.Generator) -> NDArray:
    """As many rows as images, of each class the same number to one, drawn again where a class has fewer."""
    names = draw.permutation(np.unique(classes))
    parts = []
    for number, name in enumerate(names):
        start, end = share(images, (number, len(names)))
        members, wanted = np.flatnonzero(classes == name), end - start
        times = -(-wanted // len(members))
        parts.append(np.concatenate([draw.permutation(members) for _ in range(times)])[:wanted])
    return draw.permutation(np.concatenate(parts))
