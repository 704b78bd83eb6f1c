"""Ground-truth masks as people draw them."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import UniadFastError
from ..image_size import ImageSize, Size, size_of
from ..printable import printable
from .image_files import list_images
from .images import EXIF_ORIENTATION, UnreadableImage, naming, open_image, read_bytes, stored_size, upright

_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


def read_mask(path: str | os.PathLike, image_size: ImageSize, image: str | os.PathLike | None = None) -> NDArray:
    """A ground-truth mask as bool [height, width], True where it is defective: where any colour is not black.

    What is see-through is not marked. Formats that blur edges (JPEG and the like) count from half of the range on. A
    folder stands for all the masks in it, together. Resized to the nearest sample, and, where that would leave nothing
    of thin defects, to any sample that is marked.

    Args:
        image_size: (height, width), or the side of a square.
        image: the image file that it belongs to, whose proportions it must have, and which it is turned like.

    Raises:
        UnreadableImage: as `read_image`, or it is not of the image's proportions.
    """
    path = Path(path)
    parts = list_images(path) if path.is_dir() else [path]
    if not parts:
        raise UnreadableImage(f"{printable(path)}: a folder of masks without one")
    size = size_of(image_size)
    whole = np.zeros(size, dtype=bool)
    for part in parts:
        marked = _marked(part)
        whole |= _resized(marked if image is None else _turned_like(marked, part, image), size)
    return whole


def _marked(path: Path) -> NDArray:
    """bool [height, width]."""
    content = read_bytes(path)
    with naming(path):
        mask = open_image(content)
        least = 128 if mask.format in _LOSSY else 1
        if mask.mode == "F" or mask.mode.startswith("I"):
            samples = np.asarray(mask)
            if not np.isfinite(samples).all():
                raise UnreadableImage("a mask with samples that are not finite")
            return samples != 0
        solid = np.asarray(mask.convert("RGBA").getchannel("A")) > 0 if mask.has_transparency_data else True
        return (np.asarray(mask.convert("RGB")).max(axis=2) >= least) & solid


def _turned_like(marked: NDArray, path: Path, image: str | os.PathLike) -> NDArray:
    """The mask as the upright image lies; masks are mostly drawn on that, some on the image as stored."""
    (width, height), orientation = stored_size(image)
    shown = upright((width, height), orientation)
    if marked.shape == shown or orientation == 1:
        turned = marked
    elif marked.shape == (height, width):
        picture = Image.fromarray(marked.astype(np.uint8))
        picture.getexif()[EXIF_ORIENTATION] = orientation
        turned = np.asarray(ImageOps.exif_transpose(picture)) > 0
    else:
        turned = marked
    ratio = turned.shape[0] * shown[1] / (turned.shape[1] * shown[0])
    if not 0.95 < ratio < 1.05:
        raise UnreadableImage(
            f"{printable(path)}: a mask of {turned.shape[1]} x {turned.shape[0]} pixels for an image of "
            f"{shown[1]} x {shown[0]}"
        )
    return turned


def read_roi(roi: str | os.PathLike | NDArray, image_size: ImageSize) -> NDArray:
    """Where images are looked at, as bool [height, width]: a mask, stretched over the images, True where it is not
    black.

    Args:
        roi: its file, or an array of any height and width.
        image_size: (height, width), or the side of a square.

    Raises:
        UnreadableImage: the file can't be read.
        UniadFastError: an array of another shape, or nothing is left.
    """
    if isinstance(roi, (str, os.PathLike)):
        looked_at, what = read_mask(roi, image_size), printable(roi)
    else:
        array, what = np.asarray(roi), "the mask"
        if array.ndim != 2 or 0 in array.shape:
            raise UniadFastError(f"a mask is an array [height, width], got one of shape {array.shape}")
        looked_at = _resized(array != 0, size_of(image_size))
    if not looked_at.any():
        raise UniadFastError(f"{what} is black everywhere: nothing of an image would be looked at")
    return looked_at


def _resized(marked: NDArray, size: Size) -> NDArray:
    height, width = size
    mask = Image.fromarray(marked.astype(np.uint8))
    nearest = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)) > 0
    if nearest.any() or not marked.any():
        return nearest
    thin = np.zeros(size, dtype=bool)
    rows, cols = np.nonzero(marked)
    thin[rows * height // marked.shape[0], cols * width // marked.shape[1]] = True
    return thin
