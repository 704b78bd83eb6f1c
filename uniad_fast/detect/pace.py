"""How fast images went through, and where the time went."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

_STAGES = ("waiting for files", "measuring", "verdicts", "drawing and writing")


class Pace:
    """Collects seconds by stage, and for each image those from the opening of its file to its verdict."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._latencies: list[float] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside counts to this stage, one of "waiting for files", "measuring", "verdicts" and "drawing
        and writing".
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name] += time.perf_counter() - began

    def judged(self, opened: list[float]) -> None:
        """Images whose files were opened at these times, by `time.perf_counter`, have their verdicts now."""
        now = time.perf_counter()
        self._latencies += [now - one for one in opened]

    def summary(self) -> str:
        """Images a second, half and 99% of the times from file to verdict, shares of the stages; for one line."""
        seconds, count = time.perf_counter() - self._began, len(self._latencies)
        if not count:
            return "no image was measured"
        half, most = np.quantile(self._latencies, (0.5, 0.99)) * 1000
        shares = ", ".join(f"{spent / seconds:.0%} {name}" for name, spent in self._stages.items())
        images = "1 image" if count == 1 else f"{count} images"
        return (
            f"{images} in {seconds:.1f} s, {count / seconds:.1f} a second; from file to verdict {half:.0f} ms "
            f"(99%: {most:.0f} ms); {shares}"
        )
