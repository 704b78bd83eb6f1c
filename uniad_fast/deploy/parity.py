"""Whether an exported file says what the detector says, on images: the largest differences, and what they may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import read_image
from ..detect.detector import AnomalyDetector
from ..signals import stop_if_asked
from .exported import ExportedDetector

BATCHES = (1, 7)
BOUNDS = {"float32": 0.05, "float16": 0.25, "int8": 0.5}
"""Largest difference of a score, in standard deviations of good images, by the weights' precision; for int8, which
rounds every image otherwise, the median of the scores' differences."""
OF_MAPS = 4
"""So many times as much in a map: where the detector's own network computes in bfloat16, a pixel is rounded as a score
is, and there are thousands."""
_FAR = 10
"""Standard deviations from which on a difference counts relative to the value: no verdict hangs on it there."""
_RESIZED = 5
"""So many times as much where images are resized: Pillow's versions take rows or columns first, by the image's shape,
and round to 8 bits in between, so that a pixel in five may be a level off."""


@dataclass(frozen=True)
class Parity:
    """Largest differences at one batch size, in standard deviations of good images.

    Attributes:
        batch, images: how many images at a time, and in all.
        score, map: largest difference of an image's score, and of a pixel; of values beyond 10, in tenths of the value.
        typical: median difference of the scores.
        labels, classes: how many images are labelled, or recognized, otherwise.
        resized: whether there is an image of another size than the detector's.
    """

    batch: int
    images: int
    score: float
    map: float
    typical: float
    labels: int
    classes: int
    resized: bool

    def within(self, precision: str) -> bool:
        """Whether no difference is beyond that of `BOUNDS` (with `OF_MAPS`), five times it where images are resized.

        A label may differ: then the threshold lies between two scores that are no further apart.
        """
        most = BOUNDS[precision] * (_RESIZED if self.resized else 1)
        if precision == "int8":
            return self.typical <= most and not self.classes
        return self.score <= most and self.map <= OF_MAPS * most and not self.classes


def compare(detector: AnomalyDetector, exported: ExportedDetector, paths: Sequence[Path]) -> list[Parity]:
    """What the file says beside `AnomalyDetector.predict`: of images at their own size, one by one, and of the same at
    the detector's, several at a time.

    Raises:
        UnreadableImage: one of them can't be read.
    """
    pictures = [read_image(path) for path in paths]
    height, width = detector.settings.image_size
    small = [picture.resize((width, height), Image.Resampling.BILINEAR) for picture in pictures]
    return [_compared(detector, exported, batch, own) for batch, own in zip(BATCHES, (pictures, small), strict=True)]


def _compared(
    detector: AnomalyDetector, exported: ExportedDetector, batch: int, pictures: Sequence[Image.Image]
) -> Parity:
    largest = 0.0
    scores: list[float] = []
    labels = classes = 0
    names = exported.metadata["classes"]
    for start in range(0, len(pictures), batch):
        stop_if_asked()
        group = pictures[start : start + batch]
        theirs = exported(np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in group]))
        for row, ours in enumerate(detector.predict(group)):
            scores.append(difference(np.array(ours.score), theirs["score"][row]))
            largest = max(largest, difference(ours.anomaly_map, theirs["anomaly_map"][row]))
            labels += bool(theirs["defective"][row]) != ours.label
            number = int(theirs["class"][row])
            classes += (names[number] if 0 <= number < len(names) else None) != ours.class_name
    size = detector.settings.image_size
    resized = any((picture.height, picture.width) != size for picture in pictures)
    return Parity(batch, len(pictures), max(scores), largest, float(np.median(scores)), labels, classes, resized)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest; infinite where one is not finite and the other is something else. Beyond `_FAR`, a share of it."""
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.where(same, 0, ours.astype(np.float64) - theirs)) / np.fmax(1, np.abs(ours) / _FAR)
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
