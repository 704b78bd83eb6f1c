"""Pictures cut in tiles at their own resolution: a defect is as large for the network as it is in the picture."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UniadFastError
from ..image_size import Size, in_words
from .image_batches import BATCH, Failure, ImageBatch, read_batches
from .images import UnreadableImage, stored_size, upright

STEP = 4
"""Pixels: what sides and corners of tiles are multiples of, and what a value of a tiled picture's map stands for."""
_MOST_OVERLAP = 0.9
Corner = tuple[int, int]  # (top, left) in pixels


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut: in tiles of (height, width) pixels, each of which shares `overlap` of its sides with the
    next, or more, so that they end where the picture does.

    Raises:
        UniadFastError: the overlap is not in [0, 0.9], or a side no multiple of `STEP`.
    """

    tile: Size
    overlap: float

    def __post_init__(self) -> None:
        if not isinstance(self.overlap, (int, float)) or not 0 <= self.overlap <= _MOST_OVERLAP:
            raise UniadFastError(f"the overlap of tiles must be from 0 to {_MOST_OVERLAP}, got {self.overlap!r}")
        if self.tile[0] % STEP or self.tile[1] % STEP:
            raise UniadFastError(f"the sides of tiles must be multiples of {STEP} pixels, got {in_words(self.tile)}")

    def corners(self, size: Size) -> list[Corner]:
        """Of the tiles of a picture of (height, width), row by row. A picture that is smaller than a tile has one."""
        rows, cols = (self._starts(length, tile) for length, tile in zip(size, self.tile, strict=True))
        return [(row, col) for row in rows for col in cols]

    def _starts(self, length: int, tile: int) -> list[int]:
        """Along one axis, evenly spread."""
        last = math.ceil((length - tile) / STEP)  # in steps; the last tile may end up to three pixels beyond
        if last <= 0:
            return [0]
        gaps = math.ceil(last / max(1, math.floor(tile * (1 - self.overlap) / STEP)))
        return [STEP * round(last * number / gaps) for number in range(gaps + 1)]

    def cut(self, picture: Image.Image, corner: Corner) -> Tensor:
        """A tile of an RGB picture, float32 [3, height, width] in [0, 1]; mirrored where it goes beyond the picture."""
        (top, left), (height, width) = corner, self.tile
        right, bottom = min(left + width, picture.width), min(top + height, picture.height)
        part = np.asarray(picture.crop((left, top, right, bottom)))
        beyond = ((0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0))
        return torch.from_numpy(np.pad(part, beyond, mode="symmetric")).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Plan:
    """The tiles of some pictures, numbered one picture's after the other's.

    Attributes:
        images: number of each tile's picture.
        corners: of each tile.
        sizes: (height, width) of each picture, None where it can't be told: it has one tile, which will fail.
    """

    images: list[int]
    corners: list[Corner]
    sizes: list[Size | None]

    @classmethod
    def of(cls, paths: Sequence[Path], tiling: Tiling) -> "Plan":
        """By the headers of the files, which are not decoded."""
        images, corners, sizes = list[int](), list[Corner](), list[Size | None]()
        for number, path in enumerate(paths):
            size = _upright_size(path)
            own = [(0, 0)] if size is None else tiling.corners(size)
            images += [number] * len(own)
            corners += own
            sizes.append(size)
        return cls(images, corners, sizes)


@dataclass(frozen=True)
class Tiles:
    """Where tiles lie whose features are known: the corner of each row's, and (height, width) of each image."""

    tiling: Tiling
    corners: list[Corner]
    sizes: list[Size | None]


def read_tiles(
    paths: Sequence[Path], tiling: Tiling, plan: Plan, numbers: range, digests: Sequence[str | None]
) -> Iterator[ImageBatch]:
    """Tiles of a plan in batches; positions in a batch count tiles, and a picture that can't be read fails for each."""
    spans = [(image, list(own)) for image, own in groupby(numbers, key=plan.images.__getitem__)]
    images = [image for image, _ in spans]
    batches = read_batches(
        [paths[image] for image in images], None, 1, digests=[digests[image] for image in images], keep_pictures=True
    )
    for (image, own), batch in zip(spans, batches, strict=True):
        failures = list(batch.failures)
        if not failures and batch.sizes[0] != plan.sizes[image]:  # its tiles would be other places
            failures = [Failure(0, f"it is {in_words(batch.sizes[0])} pixels, and its header says otherwise")]
        if failures:
            failed = [replace(failures[0], position=position) for position in range(len(own))]
            yield ImageBatch(torch.zeros(0, 3, *tiling.tile), [], failed, len(own))
            continue
        notes = [(0, note) for _, note in batch.notes]
        for start in range(0, len(own), BATCH):
            some = own[start : start + BATCH]
            tiles = torch.stack([tiling.cut(batch.pictures[0], plan.corners[number]) for number in some])
            yield ImageBatch(tiles, list(range(len(some))), [], len(some), notes=notes if start == 0 else [])


def _upright_size(path: Path) -> Size | None:
    try:
        return upright(*stored_size(path))
    except (UnreadableImage, OSError, ValueError):
        return None
