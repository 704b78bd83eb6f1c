"""Image files as a viewer would show them: 8-bit RGB, upright, whatever the file holds."""

import io
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UniadFastError
from ..image_size import ImageSize, Size, size_of
from ..printable import printable

ImageLike = str | os.PathLike | Image.Image | NDArray | Tensor

# What Pillow may decode. Its other readers run programs (Ghostscript) or are of no use for photographs.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000", "AVIF")
_PREVIEWS = ("MPO",)  # whose further pictures are previews of the first
EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


class UnreadableImage(UniadFastError):
    """An image file that can't be shown; the message names it and says why.

    `passing`: it may be readable next time, since not its content but the system refused (a share, a limit, a race).
    """

    passing = False


def read_image(path: str | os.PathLike) -> Image.Image:
    """The file as an 8-bit RGB image.

    EXIF rotation is applied, palettes resolved, transparency laid over white, 16-bit samples scaled down to 8.

    Raises:
        UnreadableImage: missing, empty, damaged, truncated, no image at all, several pages, or without a display range
            (float).
    """
    return decode(read_bytes(path), path)


def allow_pixels(pixels: int) -> None:
    """Let images have so many pixels, for this process: Pillow refuses 179 million and more unless told otherwise."""
    Image.MAX_IMAGE_PIXELS = (pixels + 1) // 2  # it refuses from twice that on, and warns from there


def decode(content: bytes, path: str | os.PathLike) -> Image.Image:
    """`read_image` of a file whose content has been read; `path` is for the message.

    A note of what was not shown as it is, such as 12 bits in 16, is in the image's `info["note"]`.
    """
    with naming(path):
        image = open_image(content)
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a large picture is large
        return to_rgb(image)


def pixels_of(content: bytes) -> int:
    """Height times width by the header of a file's content; 0 where there is none that can be read."""
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return image.width * image.height
    except Exception:  # whatever is wrong with it, `decode` will say
        return 0


def stored_size(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """(width and height as stored, EXIF orientation) of an image file, without decoding it.

    Raises:
        UnreadableImage: as `read_image`.
    """
    with naming(path), Image.open(path, formats=_formats()) as image:
        return image.size, int(image.getexif().get(EXIF_ORIENTATION, 1))


def upright(stored: tuple[int, int], orientation: int) -> Size:
    """(height, width) as a viewer shows it, of what `stored_size` gives."""
    width, height = stored
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def read_bytes(path: str | os.PathLike) -> bytes:
    """The file's content; UnreadableImage, which may pass, where the system does not give it."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        problem = UnreadableImage(f"{printable(path)}: {getattr(error, 'strerror', None) or error}")
        problem.passing = not isinstance(error, (IsADirectoryError, ValueError))
        raise problem from None
    if not content:
        raise UnreadableImage(f"{printable(path)}: the file is empty")
    return content


def open_image(content: bytes) -> Image.Image:
    """Decoded, its checksums verified where the format has some."""
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(f"it has more than {limit} pixels: if you trust it, allow them by --max-pixels") from None
    if image.format == "PNG":
        image.verify()  # which leaves it of no further use; decoding alone looks at no checksum
        image = Image.open(io.BytesIO(content), formats=_formats())
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _PREVIEWS:
        raise UnreadableImage(f"it holds {frames} pictures (pages or frames): write each to a file of its own")
    image.load()
    return image


@lru_cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class naming:
    """Whatever goes wrong inside is an `UnreadableImage` of that file: Pillow's readers raise many kinds."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, UnreadableImage):
            problem = UnreadableImage(f"{printable(self._path)}: {error}")
            problem.passing = error.passing
            raise problem from None
        if isinstance(error, UnidentifiedImageError):
            raise UnreadableImage(f"{printable(self._path)}: it is no image, or of a format that is not read") from None
        if isinstance(error, Exception):
            problem = UnreadableImage(f"{printable(self._path)}: {type(error).__name__}: {printable(error)}")
            problem.passing = isinstance(error, MemoryError)
            raise problem from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as 8-bit RGB; UnreadableImage for floats, which have no display range."""
    note = None
    if image.mode == "F":
        raise UnreadableImage("32-bit float samples have no display range: convert to 8 or 16 bit first")
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.int64)
        if samples.size and (samples.min() < 0 or samples.max() > 65535):
            raise UnreadableImage("32-bit integer samples beyond 16 bit have no display range")
        if samples.size and 255 < samples.max() < 4096:
            bits = int(samples.max()).bit_length()
            note = f"its samples use {bits} of 16 bits, so it is seen nearly black: scale such images to 16 or 8 bits"
        # 65535 / 255 = 257: white stays white, black stays black.
        image = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if note:
        image.info["note"] = note
    return image


def as_image(image: ImageLike) -> Image.Image:
    """A path, Pillow image, array [height, width(, 3)] or tensor [3, height, width] as 8-bit RGB.

    Raises:
        UnreadableImage: as `read_image`.
        UniadFastError: another shape, or samples that are neither uint8 nor float in [0, 1].
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    shape = tuple(image.shape)
    array = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise UniadFastError(
            "an image must be an array [height, width] or [height, width, 3], or a tensor [3, height, width], "
            f"got {type(image).__name__} of shape {shape}"
        )
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise UniadFastError(f"image samples must be uint8, or float in [0, 1], got {array.dtype}")
        if not (array.min() >= 0 and array.max() <= 1):
            raise UniadFastError(f"float image samples must be in [0, 1], got {array.min()} to {array.max()}")
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def to_tensor(image: Image.Image, image_size: ImageSize) -> Tensor:
    """An RGB image as float32 [3, height, width] in [0, 1], resized to that size (bilinear, antialiased)."""
    height, width = size_of(image_size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
