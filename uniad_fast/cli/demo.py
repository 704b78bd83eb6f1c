"""What only the demo does: a smaller data set for a quick look, and pictures of the worst."""

from pathlib import Path

from ..data.images import read_image
from ..data.samples import Dataset, Sample
from ..detect.detector import AnomalyDetector
from ..detect.evaluation import Evaluation
from ..detect.heatmap import heat_map
from ..detect.results import write_png
from ..printable import file_name

_PICTURES = 8


def picture_most_defective(detector: AnomalyDetector, evaluation: Evaluation, directory: Path) -> list[Path]:
    """Heat maps of the highest-scoring defective images, by rank."""
    ranked = sorted(
        (pair for pair in zip(evaluation.samples, evaluation.scores, strict=True) if pair[0].defective),
        key=lambda pair: -pair[1],
    )
    pictures = []
    for rank, (sample, _) in enumerate(ranked[:_PICTURES], start=1):
        picture = heat_map(
            read_image(sample.path),
            detector.predict(sample.path).anomaly_map,
            detector.calibration.color_range,
        )
        pictures.append(
            write_png(picture, directory / f"{rank:02}-{file_name(f'{sample.class_name}-{sample.path.stem}')}.png")
        )
    return pictures


def thin_out(dataset: Dataset, images_per_class: int) -> Dataset:
    """The first so many training images of each class, and as many good and defective test images."""

    def first(samples: list[Sample]) -> list[Sample]:
        counts: dict[tuple[str, bool], int] = {}
        kept = []
        for sample in samples:
            group = (sample.class_name, sample.defective)
            counts[group] = counts.get(group, 0) + 1
            if counts[group] <= images_per_class:
                kept.append(sample)
        return kept

    return Dataset(dataset.name, first(dataset.train), first(dataset.test))
