"""Heat maps: an anomaly map over its image, in colours that mean the same for every image."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Black over purple and orange to light yellow: brightness alone tells them apart, for whoever sees no red and green.
COLORS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float64)
_PICTURE = 0.6  # brightness of the picture under the map
_TRANSPARENT, _OPACITY = 0.2, 0.85  # levels below are not shown; the highest level's opacity
_STRIP = 64  # rows


def heat_map(image: Image.Image, anomaly_map: NDArray, color_range: tuple[float, float]) -> Image.Image:
    """The map laid over its image, which is shown darker and in grey, in the image's own size.

    Args:
        image: RGB.
        anomaly_map: [height, width] of any size; it is stretched over the image.
        color_range: map values of the lowest and the highest colour. It is the detector's, not the image's own
            range, so that a good image does not glow.
    """
    drawn = Image.new("RGB", image.size)
    paste_heat_map(drawn, (0, 0), image, anomaly_map, color_range)
    return drawn


def paste_heat_map(
    canvas: Image.Image,
    corner: tuple[int, int],
    image: Image.Image,
    anomaly_map: NDArray,
    color_range: tuple[float, float],
) -> None:
    """`heat_map`, drawn at a (left, top) corner of another image."""
    low, high = color_range
    level = np.clip((anomaly_map.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    for top, strip in strips(level, image.size):
        box = (0, top, image.width, top + len(strip))
        grey = np.asarray(image.crop(box).convert("L"), dtype=np.float32) * _PICTURE
        canvas.paste(Image.fromarray(_blended(grey, strip)), (corner[0], corner[1] + top))


def strips(values: NDArray, size: tuple[int, int]) -> Iterator[tuple[int, NDArray]]:
    """float32 [height, width] stretched bilinearly to an image's (width, height): (first row, some rows) at a time.

    So that a large picture needs little more memory than itself.
    """
    stretched = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    width, height = size
    scale = stretched.height / height
    for top in range(0, height, _STRIP):
        rows = min(_STRIP, height - top)
        box = (0, top * scale, stretched.width, (top + rows) * scale)
        yield top, np.asarray(stretched.resize((width, rows), Image.Resampling.BILINEAR, box))


def color_of(level: NDArray) -> NDArray:
    """Levels in [0, 1], of any shape -> float64 [..., 3], 0 to 255."""
    position = level * (len(COLORS) - 1)
    return np.stack([np.interp(position, range(len(COLORS)), channel) for channel in COLORS.T], axis=-1)


def _blended(grey: NDArray, level: NDArray) -> NDArray:
    """uint8 [rows, width, 3] of a grey picture under the colours of levels [rows, width] in [0, 1]."""
    opacity = (np.clip((level - _TRANSPARENT) / (1 - _TRANSPARENT), 0, 1) * _OPACITY)[..., None]
    return np.round((1 - opacity) * grey[..., None] + opacity * color_of(level)).astype(np.uint8)
