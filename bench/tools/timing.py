"""Median times of ways that take turns, for reports."""

import statistics
import time

from bench.tools.turns import Work


def interleaved(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
