"""Where in an image a defect is: connected places of the anomaly map above a threshold, in the image's own pixels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


@dataclass(frozen=True)
class Region:
    """A connected place above the pixel threshold, in pixels of the upright image, rows from the top.

    Attributes:
        box: (left, top, width, height), as COCO has it.
        area: pixels.
        peak: (row, col) of the highest value of the map in it.
        score, mean: that value, and the mean over the region.
    """

    box: tuple[float, float, float, float]
    area: float
    peak: tuple[float, float]
    score: float
    mean: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values: "bbox" (COCO's left, top, width, height), "area", "peak" (row, col), "score", "mean"."""
        return {
            "bbox": [round(edge, 2) for edge in self.box],
            "area": round(self.area, 2),
            "peak": [round(place, 2) for place in self.peak],
            "score": self.score,
            "mean": self.mean,
        }


def find_regions(anomaly_map: NDArray, threshold: float, size: tuple[int, int]) -> tuple[Region, ...]:
    """The regions of a map that lie above a threshold, the one with the highest value first.

    Pixels that touch at a corner are connected. A pixel of the map stands for a rectangle of the image.

    Args:
        anomaly_map: [height, width], finite.
        threshold: what a pixel has to be above.
        size: (height, width) of the image in pixels.
    """
    above = anomaly_map > threshold
    if not above.any():
        return ()
    from scipy import ndimage

    tall, wide = size[0] / anomaly_map.shape[0], size[1] / anomaly_map.shape[1]
    labelled, count = ndimage.label(above, _EIGHT_CONNECTED)
    regions = []
    for number, (rows, cols) in enumerate(ndimage.find_objects(labelled, count), start=1):
        inside = labelled[rows, cols] == number
        values = np.where(inside, anomaly_map[rows, cols], -np.inf)
        row, col = np.unravel_index(int(values.argmax()), values.shape)
        box = (
            cols.start * wide,
            rows.start * tall,
            (cols.stop - cols.start) * wide,
            (rows.stop - rows.start) * tall,
        )
        peak = ((rows.start + float(row) + 0.5) * tall, (cols.start + float(col) + 0.5) * wide)
        mean = float(values[inside].mean(dtype=np.float64))
        regions.append(Region(box, int(inside.sum()) * tall * wide, peak, float(values.max()), mean))
    return tuple(sorted(regions, key=lambda region: -region.score))
