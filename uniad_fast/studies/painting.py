"""What made-up defects are painted with."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 128
"""Side of the pictures in pixels."""
Pixels = NDArray[np.uint8]
"""[height, width, 3]."""


def save(array: NDArray, path: Path) -> None:
    """Write an image file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def shape(rng: np.random.Generator, least: float, most: float) -> NDArray[np.bool_]:
    """A blob of a random outline, its radius between `least` and `most` pixels, wholly inside."""
    from skimage.draw import polygon

    radius = rng.uniform(least, most)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    wobble = sum(rng.uniform(-0.2, 0.2) * np.cos(k * angles + rng.uniform(0, 6.3)) for k in (1, 2, 3))
    row, col = rng.uniform(1.6 * radius, SIZE - 1.6 * radius, 2)
    outline = radius * (1 + wobble)
    rows, cols = polygon(row + outline * np.sin(angles), col + outline * np.cos(angles), (SIZE, SIZE))
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[rows, cols] = True
    return mask


def paint(picture: Pixels, mask: NDArray[np.bool_], paint: NDArray) -> tuple[Pixels, Pixels]:
    """`paint` (broadcast) where the mask is; (picture, mask as 0 and 255)."""
    out = np.where(mask[..., None], np.clip(paint, 0, 255), picture).astype(np.uint8)
    return out, (mask * 255).astype(np.uint8)


def away_from(picture: Pixels, mask: NDArray[np.bool_], rng: np.random.Generator, least: float) -> float:
    """A grey level that differs from what is under the mask by `least` or more."""
    under = float(picture[mask].mean())
    return under + (1 if under < 128 else -1) * rng.uniform(least, least + 60)
