"""From scores of good images to a threshold that further ones pass as seldom as was asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UniadFastError

_TAIL = 0.25  # share of the scores that the tail is fitted to
_LEAST_TAIL = 2
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Threshold:
    """A score, and what it promises.

    Attributes:
        value: the threshold itself.
        rate: probability with which a further good image scores above it.
        interval: between which rates the true one lies with 95% confidence, if good images go on as these.
        extrapolated: whether it lies beyond what so few images can show, on a fitted tail.

    Raises:
        UniadFastError: a figure is not finite, or out of range.
    """

    value: float
    rate: float
    interval: tuple[float, float]
    extrapolated: bool

    def __post_init__(self) -> None:
        low, high = self.interval
        for number in (self.value, self.rate, low, high):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise UniadFastError(f"the threshold's figures are not all finite numbers: {self}")
        if not 0 < self.rate < 1 or not 0 <= low <= high <= 1 or not isinstance(self.extrapolated, bool):
            raise UniadFastError(f"the threshold's figures are out of range: {self}")


def threshold_for(good_scores: Sequence[float] | NDArray, false_alarm_rate: float) -> Threshold:
    """The threshold above which a further good image scores with at most that probability.

    With n scores it is an order statistic of them, so that the rate holds whatever their distribution, as long as the
    rate is 1 / (n + 1) or more. Below that nothing can be promised; there the highest quarter of the scores is taken
    for an exponential tail, which is followed beyond the last of them.

    Raises:
        UniadFastError: no score, one that is not finite, or a rate outside (0, 1).
    """
    ordered = np.sort(np.asarray(good_scores, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise UniadFastError("a threshold needs the score of at least one good image")
    if not np.isfinite(ordered).all():
        raise UniadFastError(f"{int((~np.isfinite(ordered)).sum())} of {n} scores of good images are not finite")
    if not 0 < false_alarm_rate < 1:
        raise UniadFastError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}")
    rank = math.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)
    if rank <= n:
        return Threshold(float(ordered[rank - 1]), false_alarm_rate, _interval(rank, n), False)
    if n <= _LEAST_TAIL:  # nothing to fit a tail to
        return Threshold(float(ordered[-1]), 1 / (n + 1), _interval(n, n), True)
    count = min(max(_LEAST_TAIL, round(_TAIL * n)), n - 1)
    start = ordered[n - count - 1]
    mean = float((ordered[n - count :] - start).mean())
    distance = math.log(count / n / false_alarm_rate)  # in means of the tail
    # A rate is the share that the tail has, off by chance of its count, times e^-x, off by that of its mean.
    wide = math.exp(_NORMAL_95 * math.sqrt((1 + distance**2) / count))
    value = float(start + mean * distance)
    # That the tail goes on as it begins, no score has shown: whatever it does, this many below it show this rate.
    shown = _interval(max(1, int((ordered <= value).sum())), n)[1]
    interval = (false_alarm_rate / wide, max(shown, min(1.0, false_alarm_rate * wide)))
    return Threshold(value, false_alarm_rate, interval, True)


def _interval(rank: int, n: int) -> tuple[float, float]:
    """95% interval of the rate above the rank-th of n scores: it is distributed as Beta(n + 1 - rank, rank)."""
    from scipy.special import betaincinv

    return float(betaincinv(n + 1 - rank, rank, 0.025)), float(betaincinv(n + 1 - rank, rank, 0.975))
