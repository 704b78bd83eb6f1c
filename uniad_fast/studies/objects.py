"""A many-class set in which objects lie in the same position in every image, as parts in a fixture do.

A class is one photograph of scikit-image's wheel; its good images differ as takes of one part do: shifted, turned and
scaled a little, lighter or darker, with noise. A defect is made in such a take, and its mask is what was changed.
Training and test images are different takes, so a test asks for what is usual at a place, not for another photograph.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ..packages import require
from .made_up import Counts, Product, refuse_to_overwrite, write_products
from .painting import SIZE, Pixels, paint, shape

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "rocket": "rocket.jpg",
}
_MARGIN = 1.25  # of the picture's side to what a take shows of it
_VISIBLE = 8.0  # mean change under the mask, in grey levels, at which a defect shows


def write_objects(
    directory: str | os.PathLike,
    train_images: int = 48,
    good_images: int = 16,
    defective_images: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Write the set in MVTec AD's layout, whole or not at all; the same seed gives the same files.

    Args: as of `uniad_fast.studies.textures.write_textures`.

    Raises:
        MissingPackageError: scikit-image is not installed.
        FileExistsError: there is something at `directory`.
    """
    directory = refuse_to_overwrite(directory)  # before the photographs are read
    require("skimage")
    products = {name: _product(_read(file)) for name, file in PHOTOGRAPHS.items()}
    counts = Counts(train_images, good_images, defective_images)
    write_products(directory, products, list(DEFECTS), counts, seed, _VISIBLE, quiet)


def _product(photograph: Image.Image) -> Product:
    def spoilt(rng: np.random.Generator, kind: str) -> tuple[Pixels, Pixels, Pixels]:
        take = _take(photograph, rng)
        return take, *DEFECTS[kind](take, rng)

    return Product(lambda rng, to_train: _take(photograph, rng), spoilt)


def _read(file: str) -> Image.Image:
    """The middle square of a photograph, somewhat larger than a take."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / file) as image:
        picture = image.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((round(_MARGIN * SIZE),) * 2, Image.Resampling.LANCZOS)


def _take(photograph: Image.Image, rng: np.random.Generator) -> Pixels:
    """Shifted by up to 5 pixels, turned by up to 4 degrees, scaled by 4%, lit from a side, out of focus, with noise."""
    angle, scale = np.deg2rad(rng.uniform(-4, 4)), rng.uniform(0.96, 1.04)
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    middle = photograph.width / 2 + rng.uniform(-5, 5, 2)
    half = SIZE / 2
    matrix = (cosine, sine, middle[0] - half * (cosine + sine), -sine, cosine, middle[1] - half * (cosine - sine))
    moved = photograph.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    focused = np.asarray(moved.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), dtype=np.float64)
    slope = np.linspace(-1, 1, SIZE)
    light = 1 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.1, 0.1) * slope[:, None] + rng.uniform(-0.1, 0.1) * slope
    noisy = focused * light[..., None] + rng.normal(0, rng.uniform(2, 6), focused.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


Spoil = Callable[[Pixels, np.random.Generator], tuple[Pixels, Pixels]]
"""(good take, generator) -> (spoilt take, mask of 0 and 255)."""


def _band(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A stripe across the image, somewhat lighter or darker, as a weak line of the sensor gives."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    start, width = int(rng.integers(8, SIZE - 16)), int(rng.integers(1, 4))
    mask[start : start + width] = True
    return paint(picture, mask, picture + rng.choice([-1.0, 1.0]) * rng.uniform(15, 40))


def _blurred(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A place out of focus."""
    from scipy import ndimage

    mask = shape(rng, 8, 16)
    return paint(picture, mask, ndimage.gaussian_filter(picture.astype(float), (3, 3, 0)))


def _copied(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A piece of the object where another belongs, half transparent, as a double exposure."""
    mask = shape(rng, 6, 12)
    rows, cols = rng.integers(30, 60, 2) * rng.choice([-1, 1], 2)
    other = np.roll(picture, (int(rows), int(cols)), axis=(0, 1))
    return paint(picture, mask, picture + rng.uniform(0.3, 0.7) * (other - picture.astype(float)))


def _hole(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A chip broken out, dark with a light rim."""
    from scipy import ndimage

    mask = shape(rng, 3, 6)
    inner = ndimage.binary_erosion(mask, iterations=1)
    return paint(picture, mask, 0.5 * picture + 0.5 * np.where(inner, 15.0, 220.0)[..., None])


def _pressed(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A dent: what is there is drawn together."""
    from scipy import ndimage

    radius = rng.uniform(8, 14)
    center = rng.uniform(radius + 2, SIZE - radius - 2, 2)
    offset = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")) - center[:, None, None]
    share = np.clip(np.hypot(*offset) / radius, 0, 1)
    origin = center[:, None, None] + offset * (2 - share)
    moved = [ndimage.map_coordinates(picture[..., c], origin, order=1, mode="nearest") for c in range(3)]
    return paint(picture, share < 1, np.stack(moved, axis=-1))


def _tinted(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A stain of another colour that lets most through."""
    mask = shape(rng, 6, 12)
    tint: NDArray = picture.astype(float)
    tint[..., int(rng.integers(3))] += rng.choice([-1, 1]) * rng.uniform(25, 50)
    return paint(picture, mask, tint)


DEFECTS: dict[str, Spoil] = {
    "band": _band,
    "blurred": _blurred,
    "copied": _copied,
    "hole": _hole,
    "pressed": _pressed,
    "tinted": _tinted,
}
