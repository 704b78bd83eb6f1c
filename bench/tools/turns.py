"""Ways of doing the same take turns, round by round, so that whatever else the machine does falls on all of them."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

Clock = Callable[[], float]
Work = Callable[[], object]
LEAST, MOST = 3, 30
"""Rounds of a group: at least, while it has not used three times its share; and at most, since more tell no more."""


class Way(NamedTuple):
    """Who does it, and in which dtype."""

    name: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}"


class Budget:
    """Seconds of a whole run, shared among its groups by weight: what one leaves, those after it have."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.clock, self.begin, self.end = clock, clock(), clock() + seconds
        self.weight_to_come = 1

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.clock() - self.begin

    @property
    def left(self) -> float:
        """Seconds that are still to be had, 0 once they are used up."""
        return max(0.0, self.end - self.clock())

    def share(self, weight: int = 1) -> float:
        """Seconds of a group that begins now."""
        return self.left * weight / max(weight, self.weight_to_come)


class Measured(NamedTuple):
    """Seconds of each call by way, one a round; and what each way gave at first.

    cold: there was no time to call any a second time, so that the seconds are those of the first calls.
    """

    seconds: dict[Way, list[float]]
    first: dict[Way, object]
    cold: bool = False


def take_turns(works: Mapping[Way, Work], budget: Budget, *, weight: int = 1, clock: Clock | None = None) -> Measured:
    """Each is called once to warm up, then all of them round by round, as the group's share of the budget allows.

    Args:
        clock: what a call is timed by, the budget's own if None.
    """
    clock = clock or budget.clock
    begin, share = budget.clock(), budget.share(weight)
    first: dict[Way, object] = {}
    seconds: dict[Way, list[float]] = {way: [] for way in works}

    def one_round(keep: dict[Way, object]) -> float:
        started = budget.clock()
        for way, work in works.items():
            start = clock()
            keep[way] = work()
            seconds[way].append(clock() - start)
        return budget.clock() - started

    last = one_round(first)
    if budget.clock() + last > budget.end:
        return Measured(seconds, first, cold=True)
    for times in seconds.values():
        times.clear()
    for rounds in range(1, MOST + 1):
        last = one_round({})
        if budget.clock() + last > (begin + share if rounds >= LEAST else min(begin + 3 * share, budget.end)):
            break
    return Measured(seconds, first)


class Replay:
    """A clock for pytest-benchmark, which times one way at a time: it tells the durations that were measured in turns.

    pytest-benchmark asks it before and after each call of `pedantic`.
    """

    __name__ = "measured_in_turns"

    def __init__(self) -> None:
        self._readings = iter(())

    def tell(self, seconds: Iterable[float]) -> None:
        self._readings = iter([reading for duration in seconds for reading in (0.0, duration)])

    def __call__(self) -> float:
        return next(self._readings)


def synchronized_clock() -> float:
    """Wall time once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
