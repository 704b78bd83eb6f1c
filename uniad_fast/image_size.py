"""The size that images are resized to, (height, width) in pixels; of a square, the side says it all."""

import re
from typing import Any

import numpy as np

from .errors import UniadFastError

SMALLEST, LARGEST = 32, 4096  # pixels a side
Size = tuple[int, int]
ImageSize = int | Size
"""(height, width) in pixels, or the side of a square."""


def size_of(image_size: ImageSize) -> Size:
    """(height, width) of an image size that may be the side of a square."""
    return image_size if isinstance(image_size, tuple) else (image_size, image_size)


def checked_size(image_size: Any) -> Size:
    """(height, width) of what a user, or a file, gives as an image size: an integer or a pair of them.

    Raises:
        UniadFastError: it is neither, or a side is not from `SMALLEST` to `LARGEST` pixels.
    """
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or not all(_is_int(side) and SMALLEST <= side <= LARGEST for side in sides):
        raise UniadFastError(
            f"image_size must be the side of a square or (height, width), from {SMALLEST} to {LARGEST} pixels each, "
            f"got {image_size!r}"
        )
    height, width = sides
    return int(height), int(width)  # NumPy's are no JSON


def read_size(text: str) -> Size:
    """(height, width) from words, "448" or "256x512".

    Raises:
        UniadFastError: it is neither, or out of range.
    """
    found = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if found is None:
        raise UniadFastError(
            f"image_size must be the side of a square, such as 448, or HEIGHTxWIDTH, such as 256x512, got {text!r}"
        )
    height, width = found.groups()
    return checked_size((int(height), int(width)) if width else int(height))


def in_words(image_size: ImageSize) -> str:
    """As `read_size` reads it: "448" for a square, "256x512" for another size."""
    height, width = size_of(image_size)
    return str(height) if height == width else f"{height}x{width}"


def in_json(image_size: ImageSize) -> int | list[int]:
    """As JSON: a square's side, which is what there was before other sizes were known; else [height, width]."""
    height, width = size_of(image_size)
    return height if height == width else [height, width]


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
