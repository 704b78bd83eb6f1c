"""Features that are kept nowhere: extracted anew whenever they are asked for, where a cache would be too large."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UniadFastError
from ..image_size import ImageSize
from ..models.backbone import Backbone
from ..models.prepared import prepared
from ..printable import printable
from ..progress import progress
from ..rows import row_numbers
from ..signals import stop_if_asked
from .features import Features, digest, finite_tokens, key_of, tokens_of
from .image_batches import Failure, ImageBatch, read_batches


def live_features(
    backbone: Backbone, image_size: ImageSize, paths: Sequence[Path], description: str = "features", quiet: bool = False
) -> Features:
    """Features of the images at `paths`, in order, each extracted when it is read.

    All are looked at once, to know which can be read: unreadable images are left out and listed, and so are those whose
    features are not finite.

    Raises:
        Stopped: a signal asked for it, between two batches.
    """
    used: list[int] = []
    failures: list[Failure] = []
    notes: list[str] = []
    fast, done = prepared(backbone), 0
    with progress(f"looking at {description}", len(paths), quiet=quiet) as bar:
        for batch in read_batches(paths, image_size):
            _, positions, failed = finite_tokens(batch, fast)
            used += [done + position for position in positions]
            failures += [Failure(done + one.position, one.reason, one.passing) for one in failed]
            notes += [f"{printable(paths[done + position])}: {note}" for position, note in batch.notes]
            done += batch.size
            bar.update(batch.size)
            stop_if_asked()
    tokens = LiveFeatures(backbone, image_size, [paths[index] for index in used])
    messages = [failure.message(paths) for failure in failures]
    key = key_of(backbone, image_size, "float32", paths, [digest(path) for path in paths])
    return Features(tokens, used, messages, key, notes)


class LiveFeatures:
    """Rows [images, N, C] of float32, each an image's features, extracted when they are asked for."""

    def __init__(self, backbone: Backbone, image_size: ImageSize, paths: Sequence[Path]) -> None:
        self._backbone, self._image_size, self._paths = prepared(backbone), image_size, paths
        height, width = backbone.feature_size(image_size)
        self.shape = (len(paths), height * width, backbone.channels)
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: Any) -> NDArray:
        if isinstance(rows, (int, np.integer)):
            return self[[rows]][0]
        return self._tokens(self._images(row_numbers(rows, len(self))))

    def begin_reading(self, rows: NDArray) -> Callable[[], NDArray]:
        """Decode images on another thread; whoever asks for the features computes them, on the thread that trains.

        Two threads that both compute would take the processor from each other.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="images")
        images = self._pool.submit(self._images, row_numbers(rows, len(self)))
        return lambda: self._tokens(images.result())

    def _images(self, numbers: NDArray) -> list[ImageBatch]:
        paths = [self._paths[number] for number in numbers.tolist()]
        found = list(read_batches(paths, self._image_size))
        start = 0
        for batch in found:
            if batch.failures:
                message = batch.failures[0].message(paths[start:])
                raise UniadFastError(f"{message}; it could be read when training began")
            start += batch.size
        return found

    def _tokens(self, images: list[ImageBatch]) -> NDArray:
        parts = [np.zeros((0, *self.shape[1:]), np.float32)]
        for batch in images:
            parts.append(tokens_of(batch, self._backbone))
        return np.concatenate(parts)
