"""The verdict on one image."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from .calibration import Calibration
from .regions import Region, find_regions
from .residual_score import image_scores


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the detector says of one image. Unpacks into score, label and anomaly map.

    Attributes:
        score: image score, higher is more anomalous. Of a calibrated detector, in standard deviations above what good
            images of the class have; else raw.
        label: True when the score is above the threshold, None where a detector has none (see
            `AnomalyDetector.calibrate`), or where the score is not finite.
        anomaly_map: float32 [h, w], a score for every pixel of the image as the network saw it, which is of the
            settings' `image_size`, on the same scale.
        regions: places where the map is above the detector's pixel threshold, in pixels of the upright image, the worst
            first; none for a detector without a threshold. A good image has one as seldom as it is called defective,
            but the two verdicts are apart: the label is the score's.
        class_name: class that the image was measured as; None where the detector was not sure and took it for none of
            them, or knows no classes.
    """

    score: float
    label: bool | None
    anomaly_map: NDArray
    regions: tuple[Region, ...] = ()
    class_name: str | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.score, self.label, self.anomaly_map))


def judge_maps(
    maps: Tensor,
    fields: Tensor,
    names: Sequence[str | None],
    image_score: str,
    calibration: Calibration | None,
    threshold: float | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    step: int = 1,
) -> list[Prediction]:
    """What raw anomaly maps [B, h, w] say of their images.

    Args:
        fields: by which each was measured, [B], see `Pipeline.fields_of`.
        names: of each field's class.
        image_score: one of `uniad_fast.detect.residual_score.IMAGE_SCORES`.
        calibration: of the detector, if it has one.
        threshold: instead of the calibration's.
        sizes: (height, width) of each image in pixels; None for (h, w).
        step: pixels that a value of a map stands for, along each side.
    """
    if threshold is None and calibration is not None:
        threshold = calibration.threshold.value
    if sizes is None:
        sizes = [(maps.shape[1], maps.shape[2])] * len(maps)
    predictions = []
    found = (image_scores(maps, image_score, step).tolist(), maps.cpu().numpy(), fields.tolist(), sizes)
    for score, one, field, size in zip(*found, strict=True):
        finite = math.isfinite(score)
        regions: tuple[Region, ...] = ()
        if calibration is not None:
            score, one = calibration.of_score(score, field), calibration.of_map(one, field)
            regions = find_regions(one, calibration.pixel_threshold, size) if finite else ()
        label = score > threshold if finite and threshold is not None else None
        predictions.append(Prediction(score, label, one, regions, names[field]))
    return predictions
