"""What held-out good images set: the threshold, and the colours of heat maps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UniadFastError
from .pipeline import Pipeline, to_maps
from .residual_score import image_scores

_BATCH = 32
_COLOR_IMAGES = 256


@dataclass(frozen=True)
class Calibration:
    """Figures from held-out good images.

    Attributes:
        threshold: image score above which an image is called defective.
        held_false_alarm_rate: the rate that it holds, see `threshold_for`.
        pixel_threshold: map value above which a pixel belongs to a region; a good image has such a pixel no more often
            than that rate says.
        color_range: map values between which heat maps are coloured, the same for every image.
        held_out_images, held_out_mean, held_out_std: how many there were, and their image scores.

    Raises:
        UniadFastError: a figure is not finite, or out of range.
    """

    threshold: float
    held_false_alarm_rate: float
    pixel_threshold: float
    color_range: tuple[float, float]
    held_out_images: int
    held_out_mean: float
    held_out_std: float

    def __post_init__(self) -> None:
        low, high = self.color_range
        numbers = [
            self.threshold,
            self.held_false_alarm_rate,
            self.pixel_threshold,
            low,
            high,
            self.held_out_mean,
            self.held_out_std,
        ]
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise UniadFastError(f"the figures of good images are not all finite numbers: {self}")
        if low > high or not 0 <= self.held_false_alarm_rate <= 1 or self.held_out_images < 1:
            raise UniadFastError(f"the figures of good images are out of range: {self}")

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Calibration":
        """From what `dataclasses.asdict` gave, after JSON made a list of the tuple; raises as the class does."""
        low, high = content["color_range"]
        return cls(**(content | {"color_range": (low, high)}))


def calibrate(pipeline: Pipeline, tokens: NDArray, image_score: str, false_alarm_rate: float) -> Calibration:
    """Figures from the features [images, N, C] of good images that were held out.

    Colours are set from the maps of at most 256 of them, evenly picked, so that memory stays bounded.

    Raises:
        UniadFastError: a score is not finite.
    """
    step = max(1, len(tokens) // _COLOR_IMAGES)
    scores: list[float] = []
    highest: list[float] = []
    picked: list[Tensor] = []
    for number, batch in enumerate(batches(tokens)):
        maps = to_maps(pipeline.score_maps(batch), pipeline.image_size).cpu()
        scores += image_scores(maps, image_score).tolist()
        highest += maps.amax(dim=(1, 2)).tolist()
        picked.append(maps[-number * _BATCH % step :: step].clone())
    threshold, held_rate = threshold_for(scores, false_alarm_rate)
    # Good pixels stay in the lower half of the colours: the range goes twice as far as nearly all of them do.
    typical, high = (float(q) for q in np.quantile(torch.cat(picked).numpy(), (0.5, 0.999)))
    color_range = (typical, typical + 2 * (high - typical))
    pixel_threshold, _ = threshold_for(highest, false_alarm_rate)
    figures = (len(scores), float(np.mean(scores)), float(np.std(scores)))
    return Calibration(threshold, held_rate, pixel_threshold, color_range, *figures)


def threshold_for(good_scores: Sequence[float], false_alarm_rate: float) -> tuple[float, float]:
    """(threshold, the rate it holds): a good image scores above it with at most that probability.

    The threshold is an order statistic of the n scores of held-out good images, so that the rate holds for the next
    good image whatever the scores' distribution. n images can hold no rate below 1 / (n + 1): the rate returned is
    then that one, and the threshold their maximum.

    Raises:
        UniadFastError: no score, one that is not finite, or a rate outside (0, 1).
    """
    ordered = np.sort(np.asarray(good_scores, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise UniadFastError("a threshold needs the score of at least one held-out good image")
    if not np.isfinite(ordered).all():
        raise UniadFastError(f"{int((~np.isfinite(ordered)).sum())} of {n} scores of good images are not finite")
    if not 0 < false_alarm_rate < 1:
        raise UniadFastError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}")
    rank = min(n, math.ceil((n + 1) * (1 - false_alarm_rate)))
    return float(ordered[rank - 1]), max(false_alarm_rate, 1 / (n + 1))


def batches(tokens: NDArray) -> Iterator[Tensor]:
    """Rows of a memory-mapped [images, N, C] array, a batch at a time."""
    for start in range(0, len(tokens), _BATCH):
        yield torch.from_numpy(np.array(tokens[start : start + _BATCH]))
