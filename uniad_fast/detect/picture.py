"""One picture for one image: the image, its map over it with regions and outline, the verdict, a bar of colours."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..printable import printable
from .calibration import Calibration
from .heatmap import color_of, paste_heat_map, strips
from .prediction import Prediction

_BACKGROUND, _TEXT = (24, 24, 28), (235, 235, 235)
_OUTLINE, _BOX, _TRUE = (255, 255, 255), (120, 200, 255), (70, 255, 160)
_DEFECTIVE, _GOOD = (255, 176, 0), (100, 143, 255)  # orange and blue, which everybody tells apart
_LEAST_TEXT, _MOST_TEXT = 12, 64  # pixels
_ROWS_A_LINE = 32  # of the image, for one of text
_LARGE = 16_000_000  # pixels
_MOST_LETTERS = 200


def draw_picture(
    image: Image.Image,
    prediction: Prediction,
    calibration: Calibration,
    threshold: float | None = None,
    mask: NDArray | None = None,
) -> Image.Image:
    """The image beside its heat map, both in the image's own resolution; of a very large one the heat map alone.

    On the heat map, white lines enclose what is above the pixel threshold, light blue boxes the regions. Above it are
    the class, the score and the verdict, at its side the colours' values in standard deviations of good images.

    Args:
        image: RGB, upright.
        threshold: instead of the calibration's.
        mask: bool [height, width] of any size, the true defect: enclosed in green in both.
    """
    limit = calibration.threshold.value if threshold is None else threshold
    text = int(np.clip(image.height / _ROWS_A_LINE, _LEAST_TEXT, _MOST_TEXT))
    font = ImageFont.load_default(text)
    top, gap, bar = 2 * text, text // 2, 5 * text
    caption, color = _caption(prediction, limit)
    asked = int(font.getlength(caption[:_MOST_LETTERS])) + 2 * gap
    both = image.width * image.height <= _LARGE
    width = max((1 + both) * (image.width + gap) + gap + bar, min(asked, 40 * text))
    canvas = Image.new("RGB", (width, top + image.height + gap), _BACKGROUND)
    corner = ((1 + both) * gap + both * image.width, top)  # of the heat map
    if both:
        canvas.paste(image, (gap, top))
    paste_heat_map(canvas, corner, image, prediction.anomaly_map, calibration.color_range)
    line = max(1, text // 8)
    above = _above(prediction.anomaly_map, calibration.pixel_threshold, image.size)
    _paste_edge(canvas, [corner], above, line, _OUTLINE)
    draw = ImageDraw.Draw(canvas)
    for region in prediction.regions:
        left, upper, wide, tall = region.box
        left, upper = left + corner[0], upper + corner[1]
        right, lower = max(left, left + wide - 1), max(upper, upper + tall - 1)
        draw.rectangle((left, upper, right, lower), outline=_BOX, width=line)
    if mask is not None:
        true = Image.fromarray(mask).convert("L").resize(image.size, Image.Resampling.NEAREST)
        _paste_edge(canvas, [corner, (gap, top)], true, line, _TRUE)
    draw.text((gap, top // 2), _fitting(caption, font, width - 2 * gap), fill=color, font=font, anchor="lm")
    _draw_bar(canvas, (corner[0] + image.width + gap, top), (text, image.height), calibration, font)
    return canvas


def map_image(anomaly_map: NDArray, size: tuple[int, int]) -> Image.Image:
    """The map alone as a 16-bit grey image of (width, height): a pixel is (score + 32) * 256, held in 0 to 65535."""
    pixels = np.empty((size[1], size[0]), np.uint16)
    for top, strip in strips(anomaly_map, size):
        pixels[top : top + len(strip)] = np.clip(np.round((strip + 32) * 256), 0, 65535)
    return Image.fromarray(pixels)


def _caption(prediction: Prediction, limit: float) -> tuple[str, tuple[int, int, int]]:
    verdict, color = {True: ("DEFECTIVE", _DEFECTIVE), False: ("good", _GOOD), None: ("no verdict", _TEXT)}[
        prediction.label
    ]
    words = [verdict, f"score {prediction.score:.2f}", f"threshold {limit:.2f}"]
    if prediction.class_name is not None:
        words.insert(1, printable(prediction.class_name))
    return "   ".join(words), color


def _fitting(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """As much of it as there is room for."""
    caption = caption[: _MOST_LETTERS + 1]
    while font.getlength(caption) > width and len(caption) > 1:
        caption = caption[:-2] + "…"
    return caption


def _above(anomaly_map: NDArray, threshold: float, size: tuple[int, int]) -> Image.Image:
    """White where the stretched map is above the threshold."""
    mask = Image.new("L", size)
    if anomaly_map.max() > threshold:
        for top, strip in strips(anomaly_map, size):
            mask.paste(Image.fromarray(np.where(strip > threshold, 255, 0).astype(np.uint8)), (0, top))
    return mask


def _paste_edge(
    canvas: Image.Image, corners: list[tuple[int, int]], mask: Image.Image, line: int, color: tuple[int, int, int]
) -> None:
    """The inner border of what is white in a mask, so many pixels wide, for masks that lie at these corners."""
    if (box := mask.getbbox()) is None:
        return
    part = np.asarray(mask.crop(box)) > 0
    inner = np.zeros_like(part)  # the picture's own border is a border too
    if min(part.shape) > 2 * line:
        middle = slice(line, -line)
        inner[middle, middle] = part[middle, middle]
        for rows, cols in (
            (slice(None, -2 * line), middle),
            (slice(2 * line, None), middle),
            (middle, slice(None, -2 * line)),
            (middle, slice(2 * line, None)),
        ):
            inner[middle, middle] &= part[rows, cols]
    edge = Image.fromarray((part & ~inner).view(np.uint8) * np.uint8(255))
    for left, top in corners:
        canvas.paste(color, (left + box[0], top + box[1]), edge)


def _draw_bar(
    canvas: Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    calibration: Calibration,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """The colours from the highest value to the lowest, with these and the pixel threshold beside them."""
    (left, top), (width, height) = corner, size
    low, high = calibration.color_range
    levels = np.linspace(1, 0, height)[:, None].repeat(width, axis=1)
    canvas.paste(Image.fromarray(color_of(levels).astype(np.uint8)), corner)
    draw = ImageDraw.Draw(canvas)
    for value, anchor in ((high, "la"), (low, "ld")):
        row = top if anchor == "la" else top + height
        draw.text((left + width * 1.3, row), f"{value:.1f}", fill=_TEXT, font=font, anchor=anchor)
    share = (calibration.pixel_threshold - low) / max(high - low, 1e-12)
    if 0.08 < share < 0.92:
        row = top + round((1 - share) * height)
        draw.line((left, row, left + width * 1.2, row), fill=_OUTLINE, width=max(1, width // 8))
        label = f"{calibration.pixel_threshold:.1f}"
        draw.text((left + width * 1.3, row), label, fill=_OUTLINE, font=font, anchor="lm")
