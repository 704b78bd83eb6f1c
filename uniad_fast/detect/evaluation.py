"""How good a detector is on a labelled test set, per class and on average."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.images import UnreadableImage
from ..data.masks import read_mask
from ..data.samples import DataError, Sample
from ..printable import printable
from ..training.batches import share
from ..training.processes import current
from .decisions import Decisions, decide
from .detector import AnomalyDetector
from .metrics import DETECTION, LOCALISATION, detection_metrics, localisation_metrics, mean_of_defined
from .prediction import Prediction
from .reconstructions import Reconstructions
from .score_files import score_files
from .trained import Trained

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
        decisions: what the detector's threshold does on these images; None for a detector without one.
        recognized: {"good" or "defective": (images of known classes, taken for another class, taken for none)}; None
            where no class was to be recognized.
    """

    by_class: dict[str, dict[str, float | None]]
    notes: dict[str, list[str]]
    mean: dict[str, float | None]
    samples: list[Sample]
    scores: list[float]
    unreadable: list[str]
    not_finite: list[str] = field(default_factory=list)
    decisions: Decisions | None = None
    recognized: dict[str, tuple[int, int, int]] | None = None


def evaluate(
    detector: AnomalyDetector,
    samples: Sequence[Sample],
    *,
    class_from_data: bool = False,
    reconstructions_dir: str | os.PathLike | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Score test images and measure detection (image) and, where masks exist, localisation (pixel).

    Of several processes each scores its share, and the first one measures; all of them get what it found.

    Args:
        class_from_data: measure each image as the class that the data say, not as the one that is recognized; of a
            class that the detector does not know, as what it recognizes.
        reconstructions_dir: also save each reconstructed feature map there, see `save_reconstructions`.

    Raises:
        DataError: no image could be read, or no score is finite.
        Stopped: a signal asked for it.
    """
    scored, together = _Scored(), current()
    reconstructions = Reconstructions(detector, reconstructions_dir)
    begin, end = share(len(samples), together.part)
    samples = samples[begin:end]
    known = detector.classes if class_from_data else ()
    classes = [sample.class_name if sample.class_name in known else None for sample in samples]
    for batch in score_files(detector, [sample.path for sample in samples], classes=classes, quiet=quiet):
        scored.unreadable += batch.unreadable
        scored.unreadable += reconstructions.save([samples[image.number] for image in batch.images], batch.tokens)
        for image in batch.images:
            sample, score = samples[image.number], image.prediction.score
            if math.isfinite(score):
                scored.add(sample, image.prediction, image.score_map)
            else:
                scored.not_finite.append(f"{printable(sample.path)}: its score is {score}")
    scored = _joined(together.gather(scored))
    return together.from_first(lambda: _measured(detector, scored, class_from_data))


def _joined(parts: "Sequence[_Scored]") -> "_Scored":
    """What several processes scored, in the order of the images."""
    every = _Scored()
    for part in parts:
        for item in fields(part):
            getattr(every, item.name).extend(getattr(part, item.name))
    return every


def _measured(detector: AnomalyDetector, scored: "_Scored", class_from_data: bool) -> Evaluation:
    """raises as `evaluate` does."""
    if not scored.samples:
        problems, what = (
            (scored.not_finite, "no score is finite") if scored.not_finite
            else (scored.unreadable, "no test image could be read")
        )  # fmt: skip
        raise DataError(what + "".join(f"\n  {m}" for m in problems[:10]))
    by_class: dict[str, dict[str, float | None]] = {}
    notes: dict[str, list[str]] = {}
    for name in sorted({sample.class_name for sample in scored.samples}):
        by_class[name], notes[name] = _measure(detector, name, scored)
    mean = {column: mean_of_defined([row[column] for row in by_class.values()]) for column in COLUMNS}
    notes = {name: reasons for name, reasons in notes.items() if reasons}
    decisions = None
    if detector.is_calibrated:
        decisions = decide(scored.samples, scored.scores, detector.calibration.threshold.value)
    recognized = None if class_from_data or len(detector.classes) < 2 else _recognized(scored, detector.classes)
    found = (scored.samples, scored.scores, scored.unreadable, scored.not_finite)
    return Evaluation(by_class, notes, mean, *found, decisions, recognized)


@dataclass
class _Scored:
    """Samples with their image scores and score maps, and messages about the others."""

    samples: list[Sample] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    class_names: list[str | None] = field(default_factory=list)
    score_maps: list[torch.Tensor] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    def add(self, sample: Sample, prediction: Prediction, score_map: torch.Tensor) -> None:
        self.samples.append(sample)
        self.scores.append(prediction.score)
        self.class_names.append(prediction.class_name)
        self.score_maps.append(score_map)


def _recognized(scored: _Scored, classes: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    counts = {}
    for what, defective in (("good", False), ("defective", True)):
        pairs = [
            (sample.class_name, found)
            for sample, found in zip(scored.samples, scored.class_names, strict=True)
            if sample.defective == defective and sample.class_name in classes
        ]
        unsure = sum(found is None for _, found in pairs)
        counts[what] = (len(pairs), sum(found not in (None, name) for name, found in pairs), unsure)
    return counts


def _measure(detector: AnomalyDetector, name: str, scored: _Scored) -> tuple[dict[str, float | None], list[str]]:
    """(values of `COLUMNS`, remarks) of one class."""
    rows = [i for i, sample in enumerate(scored.samples) if sample.class_name == name]
    samples = [scored.samples[i] for i in rows]
    labels = [sample.defective for sample in samples]
    image = detection_metrics([scored.scores[i] for i in rows], labels)
    unknown = detector.classes and name not in detector.classes
    notes = ["the detector was not trained on this class"] if unknown else []
    notes += [f"image metrics: {image.undefined}"] if image.undefined else []
    pixel: dict[str, float | None] = dict.fromkeys(LOCALISATION)
    if missing := sum(sample.defective and sample.mask is None for sample in samples):
        notes.append(f"pixel metrics: {missing} of {sum(labels)} defective images have no mask")
    else:
        maps = [scored.score_maps[i] for i in rows]
        found = localisation_metrics(_MapsAndMasks(detector.trained, samples, maps, scored.unreadable, notes))
        pixel = found.values
        notes += [f"pixel metrics: {found.undefined}"] if found.undefined else []
    values = {f"image_{metric}": value for metric, value in image.values.items()}
    return values | {f"pixel_{metric}": value for metric, value in pixel.items()}, notes


class _MapsAndMasks:
    """Anomaly maps and masks of some samples, made anew on each way through: they need not fit in memory."""

    def __init__(
        self,
        known: Trained,
        samples: list[Sample],
        score_maps: list[torch.Tensor],
        unreadable: list[str],
        notes: list[str],
    ) -> None:
        self._pipeline, self._tiling = known.pipeline, known.settings.tiling
        self._unreadable = unreadable
        self._notes = notes
        self._told: set[Sample] = set()
        self._items = list(zip(samples, score_maps, strict=True))

    def __iter__(self) -> Iterator[tuple[NDArray, NDArray]]:
        for item in list(self._items):
            sample, score_map = item
            size = self._pipeline.image_size if self._tiling is None else (score_map.shape[0], score_map.shape[1])
            mask = np.zeros(size, dtype=bool)
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
            mask = self._pipeline.masked(torch.from_numpy(mask)[None])[0].numpy()
            whole = score_map if self._tiling is not None else self._pipeline.enlarge(score_map[None])[0]
            yield whole.cpu().numpy(), mask
