"""What a threshold does on labelled images: found, missed, false alarms, and what other thresholds would do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.samples import GOOD, Sample, by_class

RATES = (0.01, 0.02, 0.05)
"""Shares of false alarms for which `Alternative` says what they would cost."""
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """How many images of one kind a threshold calls defective.

    Attributes:
        class_name, kind: of the images; the kind "good" has false alarms, every other has images that were found.
        images, above: how many there are, and how many score above the threshold.
        interval: between which shares the true one lies with 95% confidence (Clopper and Pearson, 1934).
    """

    class_name: str
    kind: str
    images: int
    above: int
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        """Of the images that are called defective."""
        return self.above / self.images


@dataclass(frozen=True)
class Alternative:
    """A threshold that these good images would have had a share of false alarms at.

    Attributes:
        rate: the share that was asked for.
        threshold: the lowest one that at most so many of the good images lie above.
        false_alarms, good_images, missed, defective_images: what it does to these images.
    """

    rate: float
    threshold: float
    false_alarms: int
    good_images: int
    missed: int
    defective_images: int


@dataclass(frozen=True)
class Decisions:
    """What a threshold does on labelled images.

    Attributes:
        threshold: image score above which an image is called defective.
        outcomes: one for each class and kind, good ones first.
        alternatives: one for each of `RATES`, where there are good images.
        misses, false_alarms: (sample, score) of the wrong verdicts, the worst first.
    """

    threshold: float
    outcomes: list[Outcome]
    alternatives: list[Alternative]
    misses: list[tuple[Sample, float]]
    false_alarms: list[tuple[Sample, float]]


def decide(samples: Sequence[Sample], scores: Sequence[float], threshold: float) -> Decisions:
    """What this threshold does on these images, which have finite scores."""
    score_of = dict(zip(map(id, samples), scores, strict=True))
    outcomes = []
    for class_name, members in sorted(by_class(samples).items()):
        for kind in sorted({sample.kind for sample in members}, key=lambda kind: (kind != GOOD, kind)):
            own = [score_of[id(sample)] for sample in members if sample.kind == kind]
            above = sum(score > threshold for score in own)
            outcomes.append(Outcome(class_name, kind, len(own), above, share_interval(above, len(own))))
    pairs = list(zip(samples, scores, strict=True))
    misses = sorted((p for p in pairs if p[0].defective and p[1] <= threshold), key=lambda p: p[1])
    alarms = sorted((p for p in pairs if not p[0].defective and p[1] > threshold), key=lambda p: -p[1])
    good = sorted(score for sample, score in pairs if not sample.defective)
    defective = [score for sample, score in pairs if sample.defective]
    alternatives = [_alternative(rate, good, defective) for rate in RATES] if good else []
    return Decisions(threshold, outcomes, alternatives, misses, alarms)


def _alternative(rate: float, good: Sequence[float], defective: Sequence[float]) -> Alternative:
    """good: sorted."""
    allowed = math.floor(rate * len(good))
    threshold = good[len(good) - 1 - allowed]
    alarms, missed = sum(score > threshold for score in good), sum(score <= threshold for score in defective)
    return Alternative(rate, threshold, alarms, len(good), missed, len(defective))


def share_interval(count: int, of: int) -> tuple[float, float]:
    """Between which shares the true one lies with 95% confidence, where `count` of so many were seen.

    The exact interval of Clopper and Pearson (1934), which is never too narrow.

    Raises:
        ValueError: there are none, or more than all.
    """
    from scipy.special import betaincinv

    if of < 1 or not 0 <= count <= of:
        raise ValueError(f"a share is of at least one, and not more than all, got {count} of {of}")
    tail = (1 - _CONFIDENCE) / 2
    low = 0.0 if count == 0 else float(betaincinv(count, of - count + 1, tail))
    high = 1.0 if count == of else float(betaincinv(count + 1, of - count, 1 - tail))
    return low, high
