"""The scale on which the scores of all classes mean the same: standard deviations of good images above their median.

Deviations are robust ones, from the quartiles: a few odd images among the good ones would else make a class blind. A
class's median and deviation are uncertain where it has few images. They are drawn towards those of all classes, by as
much as classes differ less than by their own uncertainty (Efron and Morris, 1975: empirical Bayes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_QUARTILES = 1.349  # how many standard deviations a normal distribution's quartiles are apart
_OF_MEDIAN = 1.571  # variance of the median of n normal scores: this / n, in variances
_OF_LOG_SPREAD = 1.36  # of the logarithm of the deviation from their quartiles: this / n
_FEWEST = 4  # images that have quartiles
_ALONE = 1e30  # a variance beside which no uncertainty counts
_LEAST = 1e-3  # of the median score; spreads below it are no measure of anything


@dataclass(frozen=True)
class Scale:
    """Of one kind of score.

    Attributes:
        centers, spreads: for each field the median and the deviation of good images' scores.
    """

    centers: tuple[float, ...]
    spreads: tuple[float, ...]


@dataclass(frozen=True)
class _Common:
    """What classes have in common, and how much they differ beyond their uncertainty."""

    center: float
    log_spread: float
    center_variance: float
    log_spread_variance: float
    floor: float

    def drawn(self, group: NDArray) -> tuple[float, float]:
        """(center, spread) of a class with these scores."""
        n = len(group)
        if n == 0:
            return self.center, float(np.exp(self.log_spread))
        noise = _OF_MEDIAN * np.exp(2 * self.log_spread) / n
        weight = float(self.center_variance / (self.center_variance + noise))
        center = weight * float(np.median(group)) + (1 - weight) * self.center
        weight = self.log_spread_variance / (self.log_spread_variance + _OF_LOG_SPREAD / n) if n >= _FEWEST else 0.0
        log = np.log(max(_spread(group), self.floor)) if n >= _FEWEST else 0.0
        return float(center), float(np.exp(weight * log + (1 - weight) * self.log_spread))


def fit_scale(groups: Sequence[NDArray]) -> Scale:
    """groups: the scores of each field's good images; a field without any has what all have in common."""
    common = _common(groups)
    drawn = [common.drawn(group) for group in groups]
    return Scale(tuple(float(center) for center, _ in drawn), tuple(spread for _, spread in drawn))


def joined(scales: Sequence[Scale]) -> Scale:
    """One of all of their fields."""
    centers = tuple(center for scale in scales for center in scale.centers)
    return Scale(centers, tuple(spread for scale in scales for spread in scale.spreads))


def scores_unseen(groups: Sequence[NDArray]) -> list[NDArray]:
    """All scores on the scale of `fit_scale`, each on one to which it had no part itself, but for what is common."""
    common = _common(groups)
    found = []
    for group in groups:
        others = [common.drawn(np.delete(group, row)) for row in range(len(group))]
        found.append(
            np.array([(score - center) / spread for score, (center, spread) in zip(group, others, strict=True)])
        )
    return found


def _common(groups: Sequence[NDArray]) -> _Common:
    groups = [group for group in groups if len(group)]
    everything = np.concatenate(groups)
    floor = _LEAST * max(float(np.median(np.abs(everything))), 1e-9)
    medians = np.array([float(np.median(group)) for group in groups])
    large = [group for group in groups if len(group) >= _FEWEST]
    if not large:  # what is left of all of them without their own medians
        within = np.concatenate([group - median for group, median in zip(groups, medians, strict=True)])
        spread = float(np.sqrt(np.square(within).sum() / max(1, len(everything) - len(groups))))
        logs = np.log([max(spread, floor)])
    else:
        logs = np.log([max(_spread(group), floor) for group in large])
    log_spread = float(np.median(logs))
    if len(groups) == 1:  # there is nothing to be drawn to
        return _Common(float(medians[0]), log_spread, _ALONE, _ALONE, floor)
    noise = float(np.mean([_OF_MEDIAN * np.exp(2 * log_spread) / len(group) for group in groups]))
    center_variance = max(0.0, float(medians.var(ddof=1)) - noise)
    between = float(logs.var(ddof=1)) if len(logs) > 1 else 0.0
    log_noise = float(np.mean([_OF_LOG_SPREAD / len(group) for group in large])) if large else 0.0
    return _Common(float(np.median(medians)), log_spread, center_variance, max(0.0, between - log_noise), floor)


def _spread(group: NDArray) -> float:
    low, high = np.quantile(group, (0.25, 0.75))
    return float(high - low) / _QUARTILES
