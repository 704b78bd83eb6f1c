"""The map of a picture from the maps of its tiles: blended where they overlap, so that no seam is seen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data.features import Features
from ..data.tiling import STEP, Corner, Tiles, Tiling
from ..image_size import Size


class Mosaic:
    """A picture's raw map [height / STEP, width / STEP], rounded up, to which tiles are added one after the other.

    A value stands for STEP x STEP pixels. Where tiles overlap, it is their mean, weighted by the distance from each
    tile's edge, which a tile knows least about.
    """

    def __init__(self, tiling: Tiling, size: Size) -> None:
        self._tiling, self._size = tiling, size
        ends = [max(one) + side for one, side in zip(zip(*tiling.corners(size), strict=True), tiling.tile, strict=True)]
        self._sum = torch.zeros(*(end // STEP for end in ends))
        self._weights = torch.zeros_like(self._sum)
        self._window = _weights(tiling)

    def add(self, corners: Sequence[Corner], score_maps: Tensor) -> None:
        """Scores per location [tiles, H, W] of the tiles at these corners."""
        tall, wide = self._window.shape
        maps = F.interpolate(score_maps[:, None].float().cpu(), (tall, wide), mode="bilinear", align_corners=True)[:, 0]
        for (top, left), one in zip(corners, maps, strict=True):
            rows, cols = slice(top // STEP, top // STEP + tall), slice(left // STEP, left // STEP + wide)
            self._sum[rows, cols] += one * self._window
            self._weights[rows, cols] += self._window

    def map(self) -> Tensor:
        """float32, once all tiles are added."""
        height, width = (-(-side // STEP) for side in self._size)
        return (self._sum / self._weights)[:height, :width]


def _weights(tiling: Tiling) -> Tensor:
    """[tile height / STEP, tile width / STEP]: rising over the overlap from each edge."""
    axes = []
    for side in tiling.tile:
        count = side // STEP
        distance = torch.minimum(torch.arange(count), torch.arange(count).flip(0)) + 0.5
        axes.append((distance / max(0.5, tiling.overlap * count)).clamp_max(1))
    return axes[0][:, None] * axes[1]


@dataclass(frozen=True)
class Pictures:
    """Which picture each of some tiles is of, and where it lies there.

    Attributes:
        numbers: of each tile's picture, [tiles].
        corners: of each tile.
        sizes: (height, width) of each picture.
    """

    tiling: Tiling
    numbers: NDArray
    corners: list[Corner]
    sizes: list[Size | None]

    @classmethod
    def of(cls, parts: Sequence[tuple[list[int], Tiles]]) -> "Pictures":
        """Of the tiles of several parts, one after the other; pictures of a later part are numbered on.

        parts: of each tile the number of its picture, and where the tiles lie.
        """
        numbers, corners, sizes = list[int](), list[Corner](), list[Size | None]()
        for images, tiles in parts:
            numbers += [len(sizes) + image for image in images]
            corners += tiles.corners
            sizes += tiles.sizes
        return cls(parts[0][1].tiling, np.array(numbers, dtype=np.int64), corners, sizes)

    def part(self, rows: NDArray) -> "Pictures":
        """Of some of the tiles alone."""
        return Pictures(self.tiling, self.numbers[rows], [self.corners[row] for row in rows], self.sizes)

    def whole(self, rows: NDArray) -> list[NDArray]:
        """Of some tiles, those of each picture that is there as a whole: their places among `rows`."""
        found = []
        own = self.numbers[rows]
        for number in dict.fromkeys(own.tolist()):
            members, size = np.flatnonzero(own == number), self.sizes[number]
            if size is not None and len(members) == len(self.tiling.corners(size)):
                found.append(members)
        return found

    def maps(self, rows: NDArray, score_maps: Tensor) -> Iterator[Tensor]:
        """Raw maps [1, height, width] of the pictures of these tiles that are there as a whole.

        score_maps: [len(rows), H, W], of the tiles.
        """
        for members in self.whole(rows):
            size = self.sizes[int(self.numbers[rows[members[0]]])]
            assert size is not None
            mosaic = Mosaic(self.tiling, size)
            mosaic.add([self.corners[rows[member]] for member in members], score_maps[torch.from_numpy(members)])
            yield mosaic.map()[None]


def pictures_of(parts: Sequence[Features]) -> Pictures | None:
    """Of the tiles of several parts, one after the other; None where images were not cut."""
    tiles = [(part.used, part.tiles) for part in parts if part.tiles is not None]
    return Pictures.of(tiles) if tiles else None


def by_majority(fields: NDArray, pictures: NDArray) -> NDArray:
    """Of each tile the field that most tiles of its picture have."""
    _, own = np.unique(pictures, return_inverse=True)
    counts = np.zeros((own.max(initial=-1) + 1, fields.max(initial=0) + 1), np.int64)
    np.add.at(counts, (own, fields), 1)
    return counts.argmax(axis=1)[own]
