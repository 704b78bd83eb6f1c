"""Scores of image files and folders on disk: a row an image, a heat-map file an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..data.image_batches import BATCH
from ..data.image_files import find_images
from ..data.samples import DataError
from ..printable import printable
from .detector import AnomalyDetector
from .heatmap import heat_map
from .results import ScoreFiles, write_png
from .score_files import ScoredImage, score_files


@dataclass
class Scored:
    """What `write_scores` found.

    Attributes:
        rows: one an image that could be read, fields as in `results.SCORE_FIELDS`.
        unreadable: a message for each image that could not.
        not_finite: a message for each whose score is not finite, which is neither good nor defective.
        not_drawn: a message for each whose heat map could not be written.
        notes: remarks on images that were not seen quite as they are.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    not_drawn: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def defective(self) -> int:
        """How many images are called defective."""
        return sum(row["label"] for row in self.rows)


class NamedImage(NamedTuple):
    """An image file, the name of its heat map, and its class where that is told."""

    path: Path
    heat_map: str
    class_name: str | None = None


def with_classes_of_folders(named: Sequence[NamedImage], classes: Sequence[str]) -> tuple[list[NamedImage], list[str]]:
    """Each with the class that the nearest folder above it is named after; remarks on those without such a folder."""
    told = []
    unknown = 0
    for one in named:
        names = [folder.name for folder in one.path.absolute().parents if folder.name in classes]
        told.append(one._replace(class_name=names[0] if names else None))
        unknown += not names
    if unknown:
        return told, [f"{unknown} of {len(named)} images lie in no folder named after a class; theirs is recognized"]
    return told, []


def name_images(arguments: Sequence[Path], leave_out: Path | None = None) -> tuple[list[NamedImage], list[str]]:
    """(image files of files and folders, each name once; remarks on what was not looked at).

    leave_out: a folder that is not looked into, the output's.

    Raises:
        DataError: there is no image at all.
    """
    found: list[tuple[Path, Path]] = []
    notes: list[str] = []
    for argument in arguments:
        if not argument.is_dir():
            found.append((argument, Path(argument.name)))
            continue
        inside = find_images(argument, leave_out)
        found += [(path, path.relative_to(argument)) for path in inside.images]
        notes += inside.problems
        if inside.others:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(inside.others.items()))
            notes.append(f"{printable(argument)}: not looked at: {listed}")
    if not found:
        raise DataError("; ".join([f"no images in {', '.join(map(printable, arguments))}", *notes]))
    named: list[NamedImage] = []
    taken: set[str] = set()
    for path, relative in found:
        name, count = str(relative.with_suffix(".png")), 1
        while name in taken:
            count += 1
            name = str(relative.with_name(f"{relative.stem}-{count}.png"))
        taken.add(name)
        named.append(NamedImage(path, name))
    return named, notes


def write_scores(
    detector: AnomalyDetector,
    named: Sequence[NamedImage],
    output: Path,
    threshold: float,
    *,
    heat_maps: bool = True,
    min_area: float = 0,
    batch_size: int = BATCH,
    quiet: bool = False,
) -> Scored:
    """Score the images and write `scores.csv`, `scores.jsonl` and `heatmaps/` into `output`.

    One image that fails, for whatever reason, leaves the others' rows on the disk, and so does a signal.

    Args:
        named: as `name_images` gives them.
        threshold: image score above which an image is defective.
        min_area: pixels that a region must have to be listed.

    Raises:
        Stopped: a signal asked for it; what is done is written.
    """
    found = Scored()
    paths = [one.path for one in named]
    classes = [one.class_name for one in named]
    options: dict[str, Any] = {"threshold": threshold, "classes": classes, "batch_size": batch_size, "quiet": quiet}
    with ScoreFiles(output) as files:
        for batch in score_files(detector, paths, keep_pictures=heat_maps, **options):
            found.unreadable += batch.unreadable
            found.notes += batch.notes
            for image in batch.images:
                prediction = image.prediction
                if not math.isfinite(prediction.score):
                    found.not_finite.append(f"{printable(image.path)}: its score is {prediction.score}")
                    continue
                drawn = None
                if heat_maps:
                    drawn = _draw(detector, image, output / "heatmaps" / named[image.number].heat_map, found)
                row = {
                    "image": str(image.path),
                    "class": prediction.class_name,
                    "score": prediction.score,
                    "label": int(bool(prediction.label)),
                    "threshold": threshold,
                    "heat_map": drawn,
                    "regions": [region.to_json() for region in prediction.regions if region.area >= min_area],
                }
                files.add(row)
                found.rows.append(row)
    return found


def _draw(detector: AnomalyDetector, image: ScoredImage, target: Path, found: Scored) -> str | None:
    assert image.picture is not None
    try:
        drawn = heat_map(image.picture, image.prediction.anomaly_map, detector.calibration.color_range)
        return str(write_png(drawn, target))
    except (OSError, MemoryError) as error:
        found.not_drawn.append(f"{printable(image.path)}: no heat map ({printable(error)})")
        return None
