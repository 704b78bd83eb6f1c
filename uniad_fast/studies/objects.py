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
from PIL import Image

from ..files import atomic_directory
from ..progress import progress
from .extra import require
from .painting import SIZE, Pixels, away_from, paint, save, shape

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
_VISIBLE = 12.0  # mean change under the mask, in grey levels, at which a defect shows
_TRIES = 20


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
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there already: choose another place")
    require("skimage")
    total = len(PHOTOGRAPHS) * (train_images + good_images + defective_images * len(DEFECTS))
    with atomic_directory(directory) as root, progress("objects", total, quiet=quiet) as bar:
        for number, (name, file) in enumerate(PHOTOGRAPHS.items()):
            rng = np.random.default_rng((seed, number))
            photograph = _read(file)
            for folder, count in (("train/good", train_images), ("test/good", good_images)):
                for index in range(count):
                    save(_take(photograph, rng), root / name / folder / f"{index:03}.png")
                    bar.update()
            for kind, spoil in DEFECTS.items():
                for index in range(defective_images):
                    spoilt, mask = _visible(spoil, photograph, rng)
                    save(spoilt, root / name / "test" / kind / f"{index:03}.png")
                    save(mask, root / name / "ground_truth" / kind / f"{index:03}_mask.png")
                    bar.update()


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
    """Shifted by up to 3 pixels, turned by up to 2 degrees, scaled by 2%, lit differently, with noise."""
    angle, scale = np.deg2rad(rng.uniform(-2, 2)), rng.uniform(0.98, 1.02)
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    middle = photograph.width / 2 + rng.uniform(-3, 3, 2)
    half = SIZE / 2
    matrix = (cosine, sine, middle[0] - half * (cosine + sine), -sine, cosine, middle[1] - half * (cosine - sine))
    moved = photograph.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    lit = np.asarray(moved, dtype=np.float64) * rng.uniform(0.92, 1.08) + rng.uniform(-6, 6)
    return np.clip(np.round(lit + rng.normal(0, 3, lit.shape)), 0, 255).astype(np.uint8)


Spoil = Callable[[Pixels, np.random.Generator], tuple[Pixels, Pixels]]
"""(good take, generator) -> (spoilt take, mask of 0 and 255)."""


def _visible(spoil: Spoil, photograph: Image.Image, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A spoilt take and its mask, drawn anew until the defect shows; the clearest of some tries at least."""
    best = (-1.0, np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    for _ in range(_TRIES):
        good = _take(photograph, rng)
        spoilt, mask = spoil(good, rng)
        change = float(np.abs(spoilt.astype(float) - good)[mask > 0].mean())
        if change > best[0]:
            best = (change, spoilt, mask)
        if change >= _VISIBLE:
            break
    return best[1], best[2]


def _band(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A stripe across the image, as a stuck line of the sensor gives."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    start, width = int(rng.integers(8, SIZE - 16)), int(rng.integers(2, 6))
    mask[start : start + width] = True
    return paint(picture, mask, np.array(away_from(picture, mask, rng, 40)))


def _blurred(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A place out of focus."""
    from scipy import ndimage

    mask = shape(rng, 12, 22)
    return paint(picture, mask, ndimage.gaussian_filter(picture.astype(float), (4, 4, 0)))


def _copied(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A piece of the object where another belongs."""
    mask = shape(rng, 10, 18)
    rows, cols = rng.integers(30, 60, 2) * rng.choice([-1, 1], 2)
    return paint(picture, mask, np.roll(picture, (int(rows), int(cols)), axis=(0, 1)))


def _hole(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A part broken out, black with a light rim."""
    from scipy import ndimage

    mask = shape(rng, 7, 13)
    inner = ndimage.binary_erosion(mask, iterations=2)
    return paint(picture, mask, np.where(inner, 15.0, 220.0)[..., None])


def _pressed(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A dent: what is there is drawn together."""
    from scipy import ndimage

    radius = rng.uniform(14, 22)
    center = rng.uniform(radius + 2, SIZE - radius - 2, 2)
    offset = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")) - center[:, None, None]
    share = np.clip(np.hypot(*offset) / radius, 0, 1)
    origin = center[:, None, None] + offset * (2 - share)
    moved = [ndimage.map_coordinates(picture[..., c], origin, order=1, mode="nearest") for c in range(3)]
    return paint(picture, share < 1, np.stack(moved, axis=-1))


def _tinted(picture: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A stain of another colour: channels are exchanged, and one is strengthened."""
    mask = shape(rng, 10, 18)
    tint: NDArray = np.roll(picture.astype(float), int(rng.integers(1, 3)), axis=2)
    tint[..., int(rng.integers(3))] += rng.uniform(40, 80)
    return paint(picture, mask, tint)


DEFECTS: dict[str, Spoil] = {
    "band": _band,
    "blurred": _blurred,
    "copied": _copied,
    "hole": _hole,
    "pressed": _pressed,
    "tinted": _tinted,
}
