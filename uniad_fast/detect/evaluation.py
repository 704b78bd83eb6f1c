"""How good a detector is on a labelled test set, per class and on average."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.image_batches import read_batches
from ..data.images import UnreadableImage, read_mask
from ..data.samples import DataError, Sample
from ..models.uniad import save_reconstructions
from ..printable import printable
from ..progress import progress
from ..signals import stop_if_asked
from .detector import AnomalyDetector
from .metrics import DETECTION, LOCALISATION, detection_metrics, localisation_metrics
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
        unreadable: a message for each image or mask that could not, and for each reconstruction not written.
        not_finite: a message for each image whose score is not finite, which nothing here counts.
    """

    by_class: dict[str, dict[str, float | None]]
    notes: dict[str, list[str]]
    mean: dict[str, float | None]
    samples: list[Sample]
    scores: list[float]
    unreadable: list[str]
    not_finite: list[str] = field(default_factory=list)


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
        DataError: no image could be read, or no score is finite.
        Stopped: a signal asked for it.
    """
    used, grids, unreadable = _score(detector, samples, reconstructions_dir, quiet)
    if not used:
        raise DataError("no test image could be read" + "".join(f"\n  {m}" for m in unreadable[:10]))
    scorer = detector.scorer
    scores = torch.cat(
        [image_scores(to_maps(part, scorer.image_size), detector.image_score) for part in grids.split(64)]
    ).tolist()
    finite = [math.isfinite(score) for score in scores]
    not_finite = [
        f"{printable(sample.path)}: its score is {score}"
        for sample, score, good in zip(used, scores, finite, strict=True)
        if not good
    ]
    if not any(finite):
        raise DataError("no score is finite" + "".join(f"\n  {m}" for m in not_finite[:10]))
    used, scores = list(compress(used, finite)), list(compress(scores, finite))
    grids = grids[torch.tensor(finite)]
    by_class: dict[str, dict[str, float | None]] = {}
    notes: dict[str, list[str]] = {}
    for name in sorted({sample.class_name for sample in used}):
        rows = [i for i, sample in enumerate(used) if sample.class_name == name]
        labels = [used[i].defective for i in rows]
        image = detection_metrics([scores[i] for i in rows], labels)
        missing = sum(used[i].defective and used[i].mask is None for i in rows)
        unknown = detector.classes and name not in detector.classes
        notes[name] = ["the detector was not trained on this class"] if unknown else []
        notes[name] += [f"image metrics: {image.undefined}"] if image.undefined else []
        maps = _MapsAndMasks(scorer, [used[i] for i in rows], grids[rows], unreadable, notes[name])
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
    return Evaluation(by_class, {k: v for k, v in notes.items() if v}, mean, used, scores, unreadable, not_finite)


def _score(
    detector: AnomalyDetector, samples: Sequence[Sample], reconstructions_dir: str | os.PathLike | None, quiet: bool
) -> tuple[list[Sample], torch.Tensor, list[str]]:
    """Readable samples, their score grids [images, H, W], and messages about the others."""
    scorer = detector.scorer
    names: dict[tuple[str, str, str], Path] = {}
    used: list[Sample] = []
    grids: list[torch.Tensor] = []
    unreadable: list[str] = []
    paths = [sample.path for sample in samples]
    with progress("scoring", len(samples), quiet=quiet) as bar:
        start = 0
        for batch in read_batches(paths, detector.image_size):
            readable = [samples[start + position] for position in batch.used]
            unreadable += [failure.message(paths[start:]) for failure in batch.failures]
            start += batch.size
            if readable:
                tokens = scorer.tokens(batch.images)
                grids.append(scorer.grids(tokens).cpu())
                if reconstructions_dir is not None:
                    saved = scorer.reconstruction(tokens)
                    for sample, one in zip(readable, saved.split(1), strict=True):
                        try:
                            file = _name_once(sample, names)
                            save_reconstructions(one, [sample.class_name], [file], reconstructions_dir)
                        except OSError as error:
                            unreadable.append(
                                f"{printable(sample.path)}: reconstruction not written ({error.strerror})"
                            )
            used += readable
            bar.update(batch.size)
            stop_if_asked()
    return used, torch.cat(grids) if grids else torch.zeros(0, 1, 1), unreadable


def _name_once(sample: Sample, names: dict[tuple[str, str, str], Path]) -> str:
    """The sample's file, for `save_reconstructions` to name its own after, told apart from others of its name."""
    name = (sample.class_name, sample.path.parent.name, sample.path.stem)
    if names.setdefault(name, sample.path) == sample.path:
        return str(sample.path)
    digest = hashlib.sha256(os.fsencode(sample.path)).hexdigest()[:8]
    return str(sample.path.with_name(f"{sample.path.stem}-{digest}{sample.path.suffix}"))


class _MapsAndMasks:
    """Anomaly maps and masks of some samples, made anew on each way through: they need not fit in memory."""

    def __init__(
        self, scorer: Scorer, samples: list[Sample], grids: torch.Tensor, unreadable: list[str], notes: list[str]
    ) -> None:
        self._scorer = scorer
        self._unreadable = unreadable
        self._notes = notes
        self._told: set[Sample] = set()
        self._items = list(zip(samples, grids, strict=True))

    def __iter__(self) -> Iterator[tuple[NDArray, NDArray]]:
        for item in list(self._items):
            sample, grid = item
            size = self._scorer.image_size
            mask = np.zeros((size, size), dtype=bool)
            if sample.mask is not None:
                try:
                    mask = read_mask(sample.mask, size, sample.path)
                except UnreadableImage as error:
                    self._unreadable.append(str(error))
                    self._items.remove(item)
                    continue
                if (not mask.any() or mask.all()) and sample not in self._told:
                    self._told.add(sample)
                    self._notes.append(f"{printable(sample.mask)} marks {'everything' if mask.all() else 'nothing'}")
            yield to_maps(grid[None], self._scorer.image_size)[0].numpy(), mask


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
