"""What a service tells Prometheus: latencies, queue, batches, verdicts, and how the scores drift."""

import threading
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..detect.prediction import Prediction

_WINDOW = 1000
_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)


class ServiceMetrics:
    """Metrics of one service, in a registry of their own.

    Attributes:
        latency: seconds from a request's first byte to its answer.
        batch: images of a batch.
        requests: by status code.
        waiting: images in the queue.
        reloads: bundles taken since the start, by outcome.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "uniad_fast"}
        self.latency = Histogram("request_seconds", "From first byte to answer", buckets=_SECONDS, **own)
        self.batch = Histogram("batch_images", "Images measured at a time", buckets=(1, 2, 4, 8, 16, 32, 64), **own)
        self.requests = Counter("requests", "Requests answered", ["status"], **own)
        self.waiting = Gauge("waiting_images", "Images in the queue", **own)
        self.reloads = Counter("reloads", "Bundles loaded since the start", ["outcome"], **own)
        self._verdicts = Counter("verdicts", "Images scored", ["class_name", "verdict"], **own)
        above = Gauge("window_share_above_threshold", f"Of the last {_WINDOW} images", **own)
        mean = Gauge("window_mean_good_score", f"Mean score of those of the last {_WINDOW} called good", **own)
        above.set_function(lambda: self._share_above())
        mean.set_function(lambda: self._mean_good())
        self._window: deque[tuple[float, bool]] = deque(maxlen=_WINDOW)
        self._lock = threading.Lock()

    def judged(self, prediction: Prediction) -> None:
        """Count a verdict."""
        defective = bool(prediction.label)
        name = prediction.class_name or ""
        self._verdicts.labels(class_name=name, verdict="defective" if defective else "good").inc()
        with self._lock:
            self._window.append((prediction.score, defective))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _share_above(self) -> float:
        with self._lock:
            return sum(defective for _, defective in self._window) / len(self._window) if self._window else 0.0

    def _mean_good(self) -> float:
        with self._lock:
            good = [score for score, defective in self._window if not defective]
        return sum(good) / len(good) if good else 0.0
