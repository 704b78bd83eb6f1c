"""Pictures of what an evaluation found worth looking at: the worst verdicts of each class, and the best ones."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..data.images import UnreadableImage, read_image
from ..data.masks import read_mask
from ..data.samples import Sample, by_class
from ..printable import file_name, printable
from .detector import AnomalyDetector
from .evaluation import Evaluation
from .picture import draw_picture
from .results import write_png

EACH = 3
"""Pictures of a kind in each class."""
_OURS = re.compile(r"(false-alarm|miss|hit)-\d\.png")


def draw_results(
    detector: AnomalyDetector, evaluation: Evaluation, directory: str | os.PathLike, class_from_data: bool = False
) -> tuple[list[Path], list[str]]:
    """Draw CLASS/false-alarm-1.png, miss-1.png and hit-1.png to hit-3.png into a folder, the worst, or best, first.

    The true mask is drawn where there is one. Of a detector with a threshold. What an earlier call has drawn there
    goes: a false alarm that is none any more would be taken for one.

    Args:
        class_from_data: as `evaluate` was told.

    Returns:
        Files, and a message for each picture that could not be made.
    """
    files: list[Path] = []
    problems: list[str] = []
    for earlier in Path(directory).glob("*/*.png"):
        if _OURS.fullmatch(earlier.name):
            earlier.unlink(missing_ok=True)
    for name, sample in _worth_looking_at(detector, evaluation):
        target = Path(directory, file_name(sample.class_name), f"{name}.png")
        try:
            image = read_image(sample.path)
            mask = None
            if sample.mask is not None:
                mask = read_mask(sample.mask, (image.height, image.width), sample.path)
            told = sample.class_name if class_from_data and sample.class_name in detector.classes else None
            prediction = detector.predict(sample.path, told)
            files.append(write_png(draw_picture(image, prediction, detector.calibration, mask=mask), target))
        except (UnreadableImage, OSError, MemoryError) as error:
            problems.append(f"{printable(sample.path)}: no picture ({printable(error)})")
    return files, problems


def _worth_looking_at(detector: AnomalyDetector, evaluation: Evaluation) -> Iterator[tuple[str, Sample]]:
    limit = detector.calibration.threshold.value
    score_of = {id(one): score for one, score in zip(evaluation.samples, evaluation.scores, strict=True)}
    for members in by_class(evaluation.samples).values():
        ranked = sorted(members, key=lambda sample: -score_of[id(sample)])
        above = [sample for sample in ranked if score_of[id(sample)] > limit]
        missed = [sample for sample in reversed(ranked) if sample.defective and score_of[id(sample)] <= limit]
        groups = {
            "false-alarm": [sample for sample in above if not sample.defective],
            "miss": missed,
            "hit": [sample for sample in above if sample.defective],
        }
        for kind, samples in groups.items():
            for number, sample in enumerate(samples[:EACH], start=1):
                yield f"{kind}-{number}", sample
