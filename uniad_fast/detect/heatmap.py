"""Heat maps: an anomaly map over its image, in colours that mean the same for every image."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Dark blue to red over green and yellow, evenly spaced; the picture shows through where the map is low.
_COLORS = np.array([[20, 30, 120], [0, 140, 200], [60, 190, 90], [250, 220, 50], [215, 40, 30]], dtype=np.float64)
_LOWEST_OPACITY, _HIGHEST_OPACITY = 0.05, 0.65
_STRIP = 64  # rows


def heat_map(image: Image.Image, anomaly_map: NDArray, color_range: tuple[float, float]) -> Image.Image:
    """The map laid over its image, in the image's own size.

    Args:
        image: RGB.
        anomaly_map: [height, width] of any size; it is stretched over the image.
        color_range: map values of the lowest and the highest colour. It is the detector's, not the image's own
            range, so that a good image does not glow.
    """
    low, high = color_range
    level = np.clip((anomaly_map.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1)
    level = np.asarray(Image.fromarray(level.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    pixels = np.array(image)
    for top in range(0, image.height, _STRIP):  # strips, so that a large picture needs little more than itself
        strip = slice(top, top + _STRIP)
        pixels[strip] = _blended(pixels[strip], level[strip])
    return Image.fromarray(pixels)


def _blended(pixels: NDArray, level: NDArray) -> NDArray:
    """uint8 [rows, width, 3] of the picture under the colours of levels [rows, width] in [0, 1]."""
    position = level * (len(_COLORS) - 1)
    colors = np.stack([np.interp(position, range(len(_COLORS)), channel) for channel in _COLORS.T], axis=-1)
    opacity = (_LOWEST_OPACITY + (_HIGHEST_OPACITY - _LOWEST_OPACITY) * level)[..., None]
    return np.round((1 - opacity) * pixels + opacity * colors).astype(np.uint8)


def side_by_side(pairs: list[tuple[Image.Image, Image.Image]], height: int = 224, gap: int = 6) -> Image.Image:
    """Pairs in a row each: image above, heat map below, all of one height."""
    columns = [[_of_height(image, height) for image in pair] for pair in pairs]
    width = sum(top.width for top, _ in columns) + gap * (len(columns) - 1)
    sheet = Image.new("RGB", (width, 2 * height + gap), "white")
    left = 0
    for top, bottom in columns:
        sheet.paste(top, (left, 0))
        sheet.paste(bottom, (left, height + gap))
        left += top.width + gap
    return sheet


def _of_height(image: Image.Image, height: int) -> Image.Image:
    return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.BILINEAR)
