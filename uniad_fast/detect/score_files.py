"""The one road of image files through a detector: read once, ahead; scored; judged."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.image_batches import BATCH, read_batches
from ..printable import printable
from ..progress import progress
from ..signals import stop_if_asked
from .detector import AnomalyDetector
from .pipeline import to_maps
from .prediction import Prediction


class ScoredImage(NamedTuple):
    """An image file and what the detector says of it.

    number: its place among the paths. picture: the decoded image, where it was asked for.
    score_map: [H, W], scores per location, of which the prediction's map is the enlargement.
    """

    number: int
    path: Path
    picture: Image.Image | None
    prediction: Prediction
    score_map: Tensor


class ScoredBatch(NamedTuple):
    """Some image files, scored.

    tokens: [len(images), N, C], their features. unreadable: a message for each that could not be read.
    notes: remarks on images that were not seen quite as they are.
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
    batch_size: int = BATCH,
    keep_pictures: bool = False,
    quiet: bool = False,
) -> Iterator[ScoredBatch]:
    """Score image files in order, a batch at a time, with a progress bar.

    Args:
        threshold: instead of the detector's.
        keep_pictures: give the decoded images too.

    Raises:
        Stopped: a signal asked for it, between two batches.
    """
    pipeline = detector.pipeline
    size = pipeline.image_size
    start = 0
    with progress("scoring", len(paths), quiet=quiet) as bar:
        for batch in read_batches(paths, size, batch_size, keep_pictures=keep_pictures):
            images: list[ScoredImage] = []
            tokens = torch.zeros(0, 0, 0)
            if batch.used:
                tokens = pipeline.tokens(batch.images)
                score_maps = pipeline.score_maps(tokens)
                predictions = detector.judge(to_maps(score_maps, size), threshold, batch.sizes)
                numbers = [start + position for position in batch.used]
                pictures = batch.pictures if keep_pictures else [None] * len(numbers)
                scored = zip(numbers, [paths[n] for n in numbers], pictures, predictions, score_maps.cpu(), strict=True)
                images = [ScoredImage(*one) for one in scored]
            yield ScoredBatch(
                images,
                tokens,
                [failure.message(paths[start:]) for failure in batch.failures],
                [f"{printable(paths[start + position])}: {note}" for position, note in batch.notes],
            )
            start += batch.size
            bar.update(batch.size)
            stop_if_asked()
