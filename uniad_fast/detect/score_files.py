"""The one road of image files through a detector: read once, ahead; scored; judged."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.image_batches import BATCH, ImageBatch
from ..printable import printable
from ..progress import progress
from ..signals import stop_if_asked
from .detector import AnomalyDetector
from .pace import Pace
from .prediction import Prediction


class ScoredImage(NamedTuple):
    """An image file and what the detector says of it.

    number: its place among the paths. picture: the decoded image, where it was asked for. size: its (height, width).
    score_map: [H, W], scores per location, of which the prediction's map is the enlargement; of an image that was
    looked at in tiles its raw anomaly map.
    """

    number: int
    path: Path
    picture: Image.Image | None
    prediction: Prediction
    score_map: Tensor
    size: tuple[int, int]


class ScoredBatch(NamedTuple):
    """Some image files, scored.

    tokens: [len(images), N, C], their features, none of images in tiles. unreadable: a message for each that could not
    be read. notes: remarks on images that were not seen quite as they are.
    """

    images: list[ScoredImage]
    tokens: Tensor
    unreadable: list[str]
    notes: list[str]


def score_files(
    detector: AnomalyDetector,
    paths: Sequence[Path],
    *,
    threshold: float | None = None,
    classes: Sequence[str | None] | None = None,
    batch_size: int = BATCH,
    keep_pictures: bool = False,
    pace: Pace | None = None,
    quiet: bool = False,
) -> Iterator[ScoredBatch]:
    """Score image files in order, a batch at a time, with a progress bar.

    Args:
        threshold: instead of the detector's.
        classes: of each image, None where it is to be recognized; None for all of them.
        keep_pictures: give the decoded images too.
        pace: told how long it takes.

    Raises:
        UniadFastError: the detector does not know a class.
        Stopped: a signal asked for it, between two batches.
    """
    numbers = {name: detector.trained.class_number(name) for name in {*(classes or ())} if name is not None}
    told = [None if name is None else numbers[name] for name in classes or [None] * len(paths)]
    start, pace = 0, pace or Pace()
    batches = detector.read(paths, batch_size, keep_pictures)
    with progress("scoring", len(paths), quiet=quiet) as bar, contextlib.closing(batches):
        while True:
            with pace.stage("waiting for files"):
                batch = next(batches, None)
            if batch is None:
                return
            own = range(start, start + batch.size)
            parts = ([paths[n] for n in own], [told[n] for n in own])
            images, tokens = _scored(detector, batch, *parts, threshold, keep_pictures, pace)
            yield ScoredBatch(
                [one._replace(number=start + one.number) for one in images],
                tokens,
                [failure.message(paths[start:]) for failure in batch.failures],
                [f"{printable(paths[start + position])}: {note}" for position, note in batch.notes],
            )
            start += batch.size
            bar.update(batch.size)
            stop_if_asked()


def _scored(
    detector: AnomalyDetector,
    batch: ImageBatch,
    paths: Sequence[Path],
    told: Sequence[int | None],
    threshold: float | None,
    keep_pictures: bool,
    pace: Pace,
) -> tuple[list[ScoredImage], Tensor]:
    """The batch's images, numbered from 0, and their features."""
    if not batch.used:
        return [], torch.zeros(0, 0, 0)
    found = detector.verdicts(batch, [told[n] for n in batch.used], threshold, pace)
    pace.judged(batch.opened)
    pictures: Sequence[Image.Image | None] = batch.pictures if keep_pictures else [None] * len(batch.used)
    own = [paths[n] for n in batch.used]
    scored = zip(batch.used, own, pictures, found.predictions, found.score_maps, batch.sizes, strict=True)
    return [ScoredImage(*one) for one in scored], found.tokens
