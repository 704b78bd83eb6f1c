"""What good images set: the scale of each class, the threshold, and the colours of heat maps."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UniadFastError
from ..rows import TokenRows
from .residual_score import image_scores
from .scales import Scale, fit_scale, joined, scores_unseen
from .tail import Threshold, threshold_for

_BATCH = 32
_COLOR_IMAGES, _COLOR_PIXELS = 256, 1 << 18  # at most that many pixels of an image
_DIGITS = 6


@dataclass(frozen=True)
class Calibration:
    """Figures from good images that had no part in what they are measured by.

    Scores and maps are in standard deviations of good images' scores above their median, class by class: 0 is what a
    good image has, whichever its class.

    Attributes:
        threshold: image score above which an image is called defective.
        pixel_threshold: map value above which a pixel belongs to a region; as many good images have such a pixel as the
            threshold's rate says.
        color_range: map values between which heat maps are coloured, the same for every image.
        scores, maps: from raw image scores, and from values of raw maps, to standard deviations, for each field.
        images: how many good images each field had; the last one's of several are the others' again.
        good_scores: of each class's good images, as they were when they had no part in what they were measured by.

    Raises:
        UniadFastError: a figure is not finite, or out of range.
    """

    threshold: Threshold
    pixel_threshold: float
    color_range: tuple[float, float]
    scores: Scale
    maps: Scale
    images: tuple[int, ...]
    good_scores: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        low, high = self.color_range
        numbers = [self.pixel_threshold, low, high]
        for scale in (self.scores, self.maps):
            numbers += [*scale.centers, *scale.spreads]
            if not len(scale.centers) == len(scale.spreads) == len(self.images):
                raise UniadFastError(f"the figures of good images are not of as many classes: {self}")
        numbers += [score for scores in self.good_scores for score in scores]
        if not all(_is_number(number) for number in numbers):
            raise UniadFastError(f"the figures of good images are not all finite numbers: {self}")
        positive = all(spread > 0 for spread in (*self.scores.spreads, *self.maps.spreads))
        counted = all(type(n) is int and n >= 0 for n in self.images)
        if low > high or not positive or not counted or not any(self.images):
            raise UniadFastError(f"the figures of good images are out of range: {self}")

    @property
    def good_images(self) -> int:
        """How many good images it was set from."""
        return sum(self.images[:-1]) if len(self.images) > 1 else self.images[0]

    def threshold_at(self, false_alarm_rate: float) -> Threshold:
        """The threshold for another rate; raises as `threshold_for` does."""
        return threshold_for([score for scores in self.good_scores for score in scores], false_alarm_rate)

    def of_score(self, score: float, field: int) -> float:
        """A raw image score in standard deviations."""
        return (score - self.scores.centers[field]) / self.scores.spreads[field]

    def of_map(self, raw: NDArray, field: int) -> NDArray:
        """A raw anomaly map in standard deviations, float32."""
        return _in_deviations(raw, self.maps.centers[field], self.maps.spreads[field])

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Calibration":
        """From what `to_json` gave, after JSON made lists of the tuples; raises as the class does."""
        low, high = content["color_range"]
        scales = {
            name: Scale(tuple(content[name]["centers"]), tuple(content[name]["spreads"])) for name in ("scores", "maps")
        }
        threshold = content["threshold"]
        interval = tuple(threshold["interval"])
        return cls(
            **(
                content
                | {"threshold": Threshold(**(threshold | {"interval": interval}))}
                | {"color_range": (low, high), "images": tuple(content["images"])}
                | {"good_scores": tuple(tuple(scores) for scores in content["good_scores"])}
                | scales
            )
        )


@dataclass(frozen=True)
class RawMaps:
    """Raw anomaly maps of some images, a batch [b, height, width] at a time, each of which may be of another size."""

    images: int
    batches: Callable[[], Iterator[Tensor]]

    @classmethod
    def enlarged(cls, score_maps: Tensor, enlarge: Callable[[Tensor], Tensor]) -> "RawMaps":
        """Of scores per location [images, H, W], by `Pipeline.enlarge`."""
        return cls(len(score_maps), lambda: (enlarge(batch.float()).cpu() for batch in score_maps.split(_BATCH)))


def calibrate(maps_of: Sequence[RawMaps], image_score: str, false_alarm_rate: float, step: int = 1) -> Calibration:
    """Figures from raw anomaly maps of good images, for each field: none where a class has none.

    Args:
        maps_of: each field's, of images that had no part in what they are measured by. Where there are several fields,
            the last one's are images of all classes, as they are measured without knowing the class.
        step: pixels that a value of a map stands for, along each side.

    Raises:
        UniadFastError: a score is not finite, or there is no image.
    """
    found = [_read(maps, image_score, step) for maps in maps_of]
    told = found[:-1] if len(found) > 1 else found
    if not sum(len(one.scores) for one in told):
        raise UniadFastError("a threshold needs the score of at least one good image")
    # What is measured without its class is a measure of its own, from which classes have nothing to learn.
    groups = [told, found[len(told) :]]
    scores = joined([fit_scale([one.scores for one in group]) for group in groups if group])
    maps = joined([fit_scale([one.highest_means for one in group]) for group in groups if group])
    of_told = list(zip(told, maps.centers, maps.spreads, strict=False))
    peaks = [_in_deviations(one.peaks, center, spread) for one, center, spread in of_told]
    pixels = [_in_deviations(one.picked, center, spread) for one, center, spread in of_told]
    if not sum(map(len, pixels)):
        raise UniadFastError("the maps of good images are all zero: no colours can be set")
    # Good pixels stay in the lower half of the colours: the range goes twice as far as nearly all of them do.
    typical, high = (float(q) for q in np.quantile(np.concatenate(pixels), (0.5, 0.999)))
    good_scores = scores_unseen([one.scores for one in told])
    return Calibration(
        threshold_for(np.concatenate(good_scores), false_alarm_rate),
        threshold_for(np.concatenate(peaks), false_alarm_rate).value,
        (typical, typical + 2 * (high - typical)),
        scores,
        maps,
        tuple(len(one.scores) for one in found),
        tuple(tuple(round(float(score), _DIGITS) for score in scores) for scores in good_scores),
    )


@dataclass(frozen=True)
class _Read:
    """Raw figures of some maps: image scores, highest means over 16 x 16 pixels, highest pixels, pixels of a few."""

    scores: NDArray
    highest_means: NDArray
    peaks: NDArray
    picked: NDArray


def _read(raw: RawMaps, image_score: str, step: int) -> _Read:
    every = max(1, raw.images // _COLOR_IMAGES)
    scores, highest, peaks = ([np.zeros(0)] for _ in range(3))
    picked, done = [np.zeros(0, np.float32)], 0
    for maps in raw.batches():
        scores.append(image_scores(maps, image_score, step).double().numpy())
        highest.append(scores[-1] if image_score == "max" else image_scores(maps, "max", step).double().numpy())
        peaks.append(maps.amax(dim=(1, 2)).numpy())
        some = maps[-done % every :: every].flatten(1)
        some = some[:, :: max(1, some.shape[1] // _COLOR_PIXELS)].flatten()
        picked.append(some[some > 0].numpy())  # what nobody looks at is 0
        done += len(maps)
    return _Read(*(np.concatenate(parts) for parts in (scores, highest, peaks, picked)))


def batches(tokens: TokenRows) -> Iterator[Tensor]:
    """Rows of [images, N, C], a batch at a time."""
    for start in range(0, len(tokens), _BATCH):
        yield torch.from_numpy(np.array(tokens[start : start + _BATCH]))


def _in_deviations(raw: NDArray, center: float, spread: float) -> NDArray:
    """Raw values in standard deviations, float32: to the bit the same for a threshold and for what is held to it."""
    return (raw.astype(np.float32) - np.float32(center)) / np.float32(spread)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
