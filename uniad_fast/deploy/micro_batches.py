"""Images that come one by one, measured together: batches formed by time and size, behind a queue with an end."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.image_batches import ImageBatch
from ..detect.detector import AnomalyDetector
from ..detect.prediction import Prediction
from ..detect.settings import DetectorSettings
from ..errors import UniadFastError
from ..image_size import in_words


class QueueFull(UniadFastError):
    """More images wait than may."""


class UnknownClass(UniadFastError):
    """The detector knows no class of that name."""


class Scored(NamedTuple):
    """A prediction, and the detector that made it."""

    prediction: Prediction
    detector: AnomalyDetector


class _Waiting(NamedTuple):
    image: Tensor | Image.Image
    size: tuple[int, int]
    class_name: str | None
    done: "Future[Scored]"


class MicroBatches:
    """A thread that measures what has been submitted, several images at a time.

    Args:
        detector: that measures.
        most: images of a batch.
        wait: seconds that a batch waits for further images once it has one.
        waiting: images that may wait.
        report: is told the size of each batch.
    """

    def __init__(
        self,
        detector: AnomalyDetector,
        most: int = 16,
        wait: float = 0.005,
        waiting: int = 64,
        report: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.detector = detector
        self._most, self._wait, self._report = most, wait, report
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(waiting)
        self._lock, self._stopped = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="micro-batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many images wait, about."""
        return self._queue.qsize()

    def submit(
        self, image: Tensor | Image.Image, size: tuple[int, int], class_name: str | None = None
    ) -> "Future[Scored]":
        """An image [3, h, w] in [0, 1], resized to the detector's size, or the picture for one that looks at tiles, and
        the (height, width) that it had.

        Args:
            class_name: None where it is to be recognized. The future fails with UnknownClass where it is not known.

        Raises:
            QueueFull: too many wait.
        """
        done: Future[Scored] = Future()
        with self._lock:
            if self._stopped:
                raise QueueFull("nothing is measured any more")
            try:
                self._queue.put_nowait(_Waiting(image, size, class_name, done))
            except queue.Full:
                raise QueueFull(f"{self._queue.maxsize} images are waiting already") from None
        return done

    def exchange(self, detector: AnomalyDetector) -> None:
        """Measure with another detector from the next batch on; it takes images of the same size.

        Raises:
            UniadFastError: it takes others.
        """
        before, after = (_taken(one.settings) for one in (self.detector, detector))
        if before != after:
            raise UniadFastError(f"the new detector takes {after}, this one {before}: start anew")
        self.detector = detector

    def stop(self) -> None:
        """Measure what waits, and end the thread."""
        with self._lock:
            self._stopped = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch, ends = self._collect()
            if batch:
                self._measure(batch)
            if ends:
                return

    def _collect(self) -> tuple[list[_Waiting], bool]:
        """Some images that belong together, and whether there are no more to come."""
        first = self._queue.get()
        if first is None:
            return [], True
        batch, until = [first], time.monotonic() + self._wait
        while len(batch) < self._most:
            try:
                one = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if one is None:
                return batch, True
            batch.append(one)
        return batch, False

    def _measure(self, batch: list[_Waiting]) -> None:
        detector = self.detector  # one for all of the batch, whatever is exchanged meanwhile
        batch = [one for one in batch if one.done.set_running_or_notify_cancel()]
        known: list[tuple[_Waiting, int | None]] = []
        for one in batch:
            try:
                told = None if one.class_name is None else detector.trained.class_number(one.class_name)
                known.append((one, told))
            except UniadFastError as error:
                one.done.set_exception(UnknownClass(str(error)))
        if not known:
            return
        self._report(len(known))
        self._measure_known(known, detector)

    def _measure_known(self, known: list[tuple[_Waiting, int | None]], detector: AnomalyDetector) -> None:
        try:
            images = [one.image for one, _ in known]
            tensors = [image for image in images if isinstance(image, Tensor)]
            batch = ImageBatch(
                torch.stack(tensors) if tensors else torch.zeros(0),
                list(range(len(images))),
                [],
                len(images),
                [one.size for one, _ in known],
                [image for image in images if not isinstance(image, Tensor)],
            )
            found = detector.verdicts(batch, [told for _, told in known]).predictions
        except Exception as error:  # whoever waits has to be told, whatever it is
            if len(known) == 1:
                known[0][0].done.set_exception(error)
            for one, told in known if len(known) > 1 else ():  # it may be one image's own fault
                self._measure_known([(one, told)], detector)
            return
        for (one, _), prediction in zip(known, found, strict=True):
            one.done.set_result(Scored(prediction, detector))


def _taken(settings: DetectorSettings) -> str:
    """What images a detector takes, in words."""
    size = in_words(settings.image_size)
    return f"images of {size} pixels" if settings.overlap is None else f"pictures in tiles of {size} pixels"
