"""How good a detector is on a labelled test set, per class and on average."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .data import DataError, Sample
from .detector import AnomalyDetector
from .features import read_batches
from .images import UnreadableImage, read_mask
from .metrics import DETECTION, LOCALISATION, detection_metrics, localisation_metrics
from .model import save_reconstructions
from .progress import progress
from .scoring import Scorer, image_scores, to_maps

COLUMNS = tuple(f"image_{name}" for name in DETECTION) + tuple(f"pixel_{name}" for name in LOCALISATION)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        by_class: {class: {column: value, or None where it is not defined}}, see `COLUMNS`.
        notes: {class: why something is not defined}.
        mean: {column: mean over the classes where it is defined, None if nowhere}.
        samples, scores: the images that could be read, and their image scores.
        unreadable: a message for each image or mask that could not.
    """

    by_class: dict[str, dict[str, float | None]]
    notes: dict[str, list[str]]
    mean: dict[str, float | None]
    samples: list[Sample]
    scores: list[float]
    unreadable: list[str]


def evaluate(
    detector: AnomalyDetector,
    samples: Sequence[Sample],
    *,
    reconstructions_dir: str | os.PathLike | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Score test images and measure detection (image) and, where masks exist, localisation (pixel).

    Args:
        reconstructions_dir: also save each reconstructed feature map there, see `save_reconstructions`.

    Raises:
        DataError: no image could be read.
    """
    used, grids, unreadable = _score(detector, samples, reconstructions_dir, quiet)
    if not used:
        raise DataError("no test image could be read" + "".join(f"\n  {m}" for m in unreadable[:10]))
    scorer = detector.scorer
    scores = torch.cat(
        [image_scores(to_maps(part, scorer.image_size), detector.image_score) for part in grids.split(64)]
    ).tolist()
    by_class: dict[str, dict[str, float | None]] = {}
    notes: dict[str, list[str]] = {}
    for name in sorted({sample.class_name for sample in used}):
        rows = [i for i, sample in enumerate(used) if sample.class_name == name]
        labels = [used[i].defective for i in rows]
        image = detection_metrics([scores[i] for i in rows], labels)
        maps = _MapsAndMasks(scorer, [used[i] for i in rows], grids[rows], unreadable)
        missing = sum(used[i].defective and used[i].mask is None for i in rows)
        notes[name] = [f"image metrics: {image.undefined}"] if image.undefined else []
        values = {f"image_{metric}": value for metric, value in image.values.items()}
        if missing:
            pixel_values: dict[str, float | None] = dict.fromkeys(LOCALISATION)
            notes[name].append(f"pixel metrics: {missing} of {sum(labels)} defective images have no mask")
        else:
            pixel = localisation_metrics(maps)
            pixel_values = pixel.values
            notes[name] += [f"pixel metrics: {pixel.undefined}"] if pixel.undefined else []
        by_class[name] = values | {f"pixel_{metric}": value for metric, value in pixel_values.items()}
    mean = {column: _mean([row[column] for row in by_class.values()]) for column in COLUMNS}
    return Evaluation(by_class, {k: v for k, v in notes.items() if v}, mean, used, scores, unreadable)


def _score(
    detector: AnomalyDetector, samples: Sequence[Sample], reconstructions_dir: str | os.PathLike | None, quiet: bool
) -> tuple[list[Sample], torch.Tensor, list[str]]:
    """Readable samples, their score grids [images, H, W], and messages about the others."""
    scorer = detector.scorer
    used: list[Sample] = []
    grids: list[torch.Tensor] = []
    unreadable: list[str] = []
    with progress("scoring", len(samples), quiet=quiet) as bar:
        start = 0
        for batch in read_batches([sample.path for sample in samples], detector.image_size):
            readable = [samples[start + position] for position in batch.used]
            start += batch.size
            if readable:
                tokens = scorer.tokens(batch.images)
                grids.append(scorer.grids(tokens).cpu())
                if reconstructions_dir is not None:
                    save_reconstructions(
                        scorer.reconstruction(tokens),
                        [sample.class_name for sample in readable],
                        [str(sample.path) for sample in readable],
                        reconstructions_dir,
                    )
            used += readable
            unreadable += batch.unreadable
            bar.update(batch.size)
    return used, torch.cat(grids) if grids else torch.zeros(0, 1, 1), unreadable


class _MapsAndMasks:
    """Anomaly maps and masks of some samples, made anew on each way through: they need not fit in memory."""

    def __init__(self, scorer: Scorer, samples: list[Sample], grids: torch.Tensor, unreadable: list[str]) -> None:
        self._scorer = scorer
        self._unreadable = unreadable
        self._items = list(zip(samples, grids, strict=True))

    def __iter__(self) -> Iterator[tuple[NDArray, NDArray]]:
        for item in list(self._items):
            sample, grid = item
            size = self._scorer.image_size
            mask = np.zeros((size, size), dtype=bool)
            if sample.mask is not None:
                try:
                    mask = read_mask(sample.mask, size)
                except UnreadableImage as error:
                    self._unreadable.append(str(error))
                    self._items.remove(item)
                    continue
            yield to_maps(grid[None], self._scorer.image_size)[0].numpy(), mask


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
