"""Image files as a viewer would show them: 8-bit RGB, upright, whatever the file holds."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UniadFastError
from ..printable import printable

ImageLike = str | os.PathLike | Image.Image | NDArray | Tensor

# What Pillow may decode. Its other readers run programs (Ghostscript) or are of no use for photographs.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000", "AVIF")
EXTENSIONS = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".gif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".avif",
        ".mpo",
    ]
)
_PREVIEWS = ("MPO",)  # whose further pictures are previews of the first
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


class UnreadableImage(UniadFastError):
    """An image file that can't be shown; the message names it and says why.

    `passing`: it may be readable next time, since not its content but the system refused (a share, a limit, a race).
    """

    passing = False


@dataclass(frozen=True)
class Found:
    """What lies in a folder: image files in order, files that were not looked at by kind, and what went wrong."""

    images: list[Path]
    others: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def read_image(path: str | os.PathLike) -> Image.Image:
    """The file as an 8-bit RGB image.

    EXIF rotation is applied, palettes resolved, transparency laid over white, 16-bit samples scaled down to 8.

    Raises:
        UnreadableImage: missing, empty, damaged, truncated, no image at all, several pages, or without a display range
            (float).
    """
    return decode(_read(path), path)


def allow_pixels(pixels: int) -> None:
    """Let images have so many pixels, for this process: Pillow refuses 179 million and more unless told otherwise."""
    Image.MAX_IMAGE_PIXELS = (pixels + 1) // 2  # it refuses from twice that on, and warns from there


def read_bytes(path: str | os.PathLike) -> bytes:
    """The file's content; UnreadableImage, which may pass, where the system does not give it."""
    return _read(path)


def decode(content: bytes, path: str | os.PathLike) -> Image.Image:
    """`read_image` of a file whose content has been read; `path` is for the message.

    A note of what was not shown as it is, such as 12 bits in 16, is in the image's `info["note"]`.
    """
    with _named(path):
        image = ImageOps.exif_transpose(_open(content))
        return to_rgb(image)


def image_size(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """(width and height as stored, EXIF orientation) of an image file, without decoding it.

    Raises:
        UnreadableImage: as `read_image`.
    """
    with _named(path), Image.open(path, formats=_formats()) as image:
        return image.size, int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _read(path: str | os.PathLike) -> bytes:
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        problem = UnreadableImage(f"{printable(path)}: {getattr(error, 'strerror', None) or error}")
        problem.passing = not isinstance(error, (IsADirectoryError, ValueError))
        raise problem from None
    if not content:
        raise UnreadableImage(f"{printable(path)}: the file is empty")
    return content


def _open(content: bytes) -> Image.Image:
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


class _named:
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
    image = image.convert("RGB")
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


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image as float32 [3, size, size] in [0, 1], resized to the square (bilinear, antialiased)."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def read_mask(path: str | os.PathLike, size: int, image: str | os.PathLike | None = None) -> NDArray:
    """A ground-truth mask as bool [size, size], True where it is defective: where any colour is not black.

    What is see-through is not marked. Formats that blur edges (JPEG and the like) count from half of the range on. A
    folder stands for all the masks in it, together. Resized to the nearest sample, and, where that would leave nothing
    of thin defects, to any sample that is marked.

    Args:
        image: the image file that it belongs to, whose proportions it must have, and which it is turned like.

    Raises:
        UnreadableImage: as `read_image`, or it is not of the image's proportions.
    """
    path = Path(path)
    parts = list_images(path) if path.is_dir() else [path]
    if not parts:
        raise UnreadableImage(f"{printable(path)}: a folder of masks without one")
    whole = np.zeros((size, size), dtype=bool)
    for part in parts:
        marked = _marked(part)
        whole |= _to_square(marked if image is None else _turned_like(marked, part, image), size)
    return whole


def _marked(path: Path) -> NDArray:
    """bool [height, width]."""
    content = _read(path)
    with _named(path):
        mask = _open(content)
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
    (width, height), orientation = image_size(image)
    upright = (width, height) if orientation in _SIDEWAYS else (height, width)
    if marked.shape == upright or orientation == 1:
        turned = marked
    elif marked.shape == (height, width):
        picture = Image.fromarray(marked.astype(np.uint8))
        picture.getexif()[_EXIF_ORIENTATION] = orientation
        turned = np.asarray(ImageOps.exif_transpose(picture)) > 0
    else:
        turned = marked
    ratio = turned.shape[0] * upright[1] / (turned.shape[1] * upright[0])
    if not 0.95 < ratio < 1.05:
        raise UnreadableImage(
            f"{printable(path)}: a mask of {turned.shape[1]} x {turned.shape[0]} pixels for an image of "
            f"{upright[1]} x {upright[0]}"
        )
    return turned


def _to_square(marked: NDArray, size: int) -> NDArray:
    mask = Image.fromarray(marked.astype(np.uint8))
    nearest = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0
    if nearest.any() or not marked.any():
        return nearest
    thin = np.zeros((size, size), dtype=bool)
    rows, cols = np.nonzero(marked)
    thin[rows * size // marked.shape[0], cols * size // marked.shape[1]] = True
    return thin


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files in a folder and below, in sorted order; hidden files and folders are left out."""
    return find_images(folder).images


def find_images(folder: str | os.PathLike, leave_out: str | os.PathLike | None = None) -> Found:
    """What lies in a folder and below. Links are followed, but not into a folder that contains them.

    Hidden files and folders are left out without a word, and so is the folder `leave_out`.
    """
    folder = Path(folder)
    found = Found([])
    excluded = os.path.realpath(leave_out) if leave_out is not None else None
    for path in _files(folder, (), excluded, found.problems):
        if path.suffix.lower() in EXTENSIONS:
            found.images.append(path)
        else:
            found.others[path.suffix.lower() or "no extension"] += 1
    found.images.sort()
    return found


def _files(folder: Path, above: tuple[str, ...], excluded: str | None, problems: list[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        problems.append(f"{printable(folder)}: a link to a folder that contains it")
        return
    if real == excluded:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{printable(folder)}: {error.strerror}")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir():
                yield from _files(folder / entry.name, (*above, real), excluded, problems)
            elif entry.is_file():
                yield folder / entry.name
            elif entry.is_symlink():
                problems.append(f"{printable(folder / entry.name)}: a link to nothing")
        except OSError as error:
            problems.append(f"{printable(folder / entry.name)}: {error.strerror}")
