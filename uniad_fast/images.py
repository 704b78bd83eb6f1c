"""Image files as a viewer would show them: 8-bit RGB, upright, whatever the file holds."""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

ImageLike = str | os.PathLike | Image.Image | NDArray | Tensor

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})


class UnreadableImage(ValueError):
    """An image file that can't be shown; the message names it and says why."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """The file as an 8-bit RGB image.

    EXIF rotation is applied, palettes resolved, transparency laid over white, 16-bit samples scaled down to 8.

    Raises:
        UnreadableImage: missing, empty, damaged, truncated, no image at all, or without a display range (float).
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise UnreadableImage("the file is empty")
        with Image.open(path) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            image.load()
            return to_rgb(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path}: {error}") from None
    except Exception as error:  # Pillow's plugins raise many kinds; each means that this file is not usable
        raise UnreadableImage(f"{path}: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as 8-bit RGB; UnreadableImage for floats, which have no display range."""
    if image.mode == "F":
        raise UnreadableImage("32-bit float samples have no display range: convert to 8 or 16 bit first")
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.int64)
        if samples.size and (samples.min() < 0 or samples.max() > 65535):
            raise UnreadableImage("32-bit integer samples beyond 16 bit have no display range")
        # 65535 / 255 = 257: white stays white, black stays black.
        image = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_image(image: ImageLike) -> Image.Image:
    """A path, Pillow image, array [height, width(, 3)] or tensor [3, height, width] as 8-bit RGB.

    Raises:
        UnreadableImage: as `read_image`.
        ValueError: another shape, or samples that are neither uint8 nor float in [0, 1].
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    shape = tuple(image.shape)
    array = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise ValueError(
            "an image must be an array [height, width] or [height, width, 3], or a tensor [3, height, width], "
            f"got {type(image).__name__} of shape {shape}"
        )
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"image samples must be uint8, or float in [0, 1], got {array.dtype}")
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"float image samples must be in [0, 1], got {array.min()} to {array.max()}")
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image as float32 [3, size, size] in [0, 1], resized to the square (bilinear, antialiased)."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def read_mask(path: str | os.PathLike, size: int) -> np.ndarray:
    """A ground-truth mask file as bool [size, size], True where any sample is above half of its range.

    Raises:
        UnreadableImage: as `read_image`.
    """
    mask = read_image(path).convert("L").resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(mask) > 127


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files in a folder and below, in sorted order; hidden files and folders are left out."""
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
