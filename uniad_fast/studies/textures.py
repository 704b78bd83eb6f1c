"""A many-class set with pixel masks that any machine can make: textures of scikit-image's wheel, spoilt in six ways.

Good images are random crops; the sources are cut in two, and training and test images come from different parts, so
that they share no pixel. A defect is painted on a good crop of the test part, and its mask is the painted shape itself.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..packages import require
from .made_up import Counts, Product, refuse_to_overwrite, write_products
from .painting import SIZE, Pixels, away_from, paint, shape

TRAIN_SHARE = 0.6  # of a source's longer side
_VISIBLE = 12.0  # mean change under the mask, in grey levels, at which a defect shows

Spoil = Callable[[Pixels, Pixels, np.random.Generator], tuple[Pixels, Pixels]]
"""(good crop, crop of another class, generator) -> (spoilt crop, mask of 0 and 255)."""


@dataclass(frozen=True)
class Source:
    """A picture of the wheel, and the part of it that is used: (first row, last row, first column, last column)."""

    file: str
    part: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    crop: int = SIZE

    def read(self) -> Pixels:
        import skimage

        top, bottom, left, right = self.part
        with Image.open(Path(skimage.__file__).parent / "data" / self.file) as image:
            return np.asarray(image.convert("RGB"))[top:bottom, left:right]


SOURCES = {
    "brick": Source("brick.png"),
    "coins": Source("coins.png", crop=112),
    "grass": Source("grass.png"),
    "gravel": Source("gravel.png"),
    "moon": Source("moon.png"),
    "retina": Source("retina.jpg", (350, 1050, 250, 1150)),
    "stars": Source("hubble_deep_field.jpg"),
    "tissue": Source("ihc.png"),
}


def write_textures(
    directory: str | os.PathLike,
    train_images: int = 48,
    good_images: int = 16,
    defective_images: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Write the set in MVTec AD's layout, whole or not at all; the same seed gives the same files.

    Args:
        directory: made; must not exist or be empty.
        train_images, good_images, defective_images: for each class; the last for each kind of defect too.

    Raises:
        MissingPackageError: scikit-image is not installed.
        FileExistsError: there is something at `directory`.
    """
    directory = refuse_to_overwrite(directory)  # before the photographs are read
    require("skimage")
    parts = {name: _two_parts(source.read()) for name, source in SOURCES.items()}
    products = {name: _product(name, source.crop, parts) for name, source in SOURCES.items()}
    counts = Counts(train_images, good_images, defective_images)
    write_products(directory, products, list(DEFECTS), counts, seed, _VISIBLE, quiet)


def _product(name: str, size: int, parts: Mapping[str, tuple[Pixels, Pixels]]) -> Product:
    train, test = parts[name]
    others = [part for other, (_, part) in parts.items() if other != name]

    def good(rng: np.random.Generator, to_train: bool) -> Pixels:
        return _crop(train if to_train else test, size, rng)

    def spoilt(rng: np.random.Generator, kind: str) -> tuple[Pixels, Pixels, Pixels]:
        image, other = _crop(test, size, rng), _crop(others[rng.integers(len(others))], size, rng)
        return image, *DEFECTS[kind](image, other, rng)

    return Product(good, spoilt)


def _two_parts(picture: Pixels) -> tuple[Pixels, Pixels]:
    """The training and the test part, cut across the longer side."""
    axis = 1 if picture.shape[1] >= picture.shape[0] else 0
    first, second = np.split(picture, [round(TRAIN_SHARE * picture.shape[axis])], axis=axis)
    return first, second


def _crop(part: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A random square, mirrored or not, at the set's size."""
    row, col = (rng.integers(0, extent - size + 1) for extent in part.shape[:2])
    crop = part[row : row + size, col : col + size]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    if size == SIZE:
        return np.ascontiguousarray(crop)
    return np.asarray(Image.fromarray(crop).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _scratch(picture: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A bent line, lighter or darker."""
    from scipy import ndimage
    from skimage.draw import line

    mask = np.zeros((SIZE, SIZE), dtype=bool)
    point, angle = rng.uniform(30, SIZE - 30, 2), rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(3, 6)):
        end = np.clip(point + rng.uniform(12, 22) * np.array([np.sin(angle), np.cos(angle)]), 2, SIZE - 3)
        mask[line(*point.astype(int), *end.astype(int))] = True
        point, angle = end, angle + rng.uniform(-0.6, 0.6)
    mask = ndimage.binary_dilation(mask, iterations=int(rng.integers(1, 3)))
    return paint(picture, mask, np.array(away_from(picture, mask, rng, 60)))


def _blot(picture: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A stain that covers and lets a little through."""
    mask = shape(rng, 8, 16)
    return paint(picture, mask, 0.25 * picture + 0.75 * away_from(picture, mask, rng, 50))


def _missing(picture: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A part without structure: the mean of what was there, with a little noise."""
    mask = shape(rng, 10, 20)
    return paint(picture, mask, picture[mask].mean(axis=0) + rng.normal(0, 2, (SIZE, SIZE, 1)))


def _contamination(picture: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A piece of another class."""
    mask = shape(rng, 10, 20)
    return paint(picture, mask, other)


def _warp(picture: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A swirl; the mask is where it moves a pixel by two or more, and the middle of that."""
    from scipy import ndimage
    from skimage.transform import warp

    radius = rng.uniform(16, 26)
    center = rng.uniform(radius + 2, SIZE - radius - 2, 2)
    strength = rng.choice([-1, 1]) * rng.uniform(2.0, 3.5)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")).astype(float)
    offset = grid - center[:, None, None]
    distance = np.hypot(*offset)
    angle = strength * np.clip(1 - distance / radius, 0, 1)
    sine, cosine = np.sin(angle), np.cos(angle)
    origin = center[:, None, None] + np.stack(
        [cosine * offset[0] - sine * offset[1], sine * offset[0] + cosine * offset[1]]
    )
    mask = ndimage.binary_fill_holes(np.hypot(*(origin - grid)) >= 2)
    moved = np.stack([warp(picture[..., c] / 255, origin, order=1, mode="reflect") for c in range(3)], axis=-1)
    return paint(picture, mask, np.round(255 * moved))


def _misplaced(picture: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A piece of the same image, turned by a quarter and enlarged."""
    mask = shape(rng, 10, 18)
    middle = picture[24:104, 24:104]
    turned = Image.fromarray(np.rot90(middle).copy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return paint(picture, mask, np.asarray(turned))


DEFECTS: dict[str, Spoil] = {
    "blot": _blot,
    "contamination": _contamination,
    "misplaced": _misplaced,
    "missing": _missing,
    "scratch": _scratch,
    "warp": _warp,
}
