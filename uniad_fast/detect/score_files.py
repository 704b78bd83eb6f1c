"""Score image files and folders: a row an image, a heat-map file an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.image_batches import read_batches
from ..data.images import UnreadableImage, find_images, read_image
from ..data.samples import DataError
from ..printable import printable
from ..progress import progress
from ..signals import stop_if_asked
from .detector import AnomalyDetector
from .heatmap import heat_map
from .results import ScoreFiles, write_png


@dataclass
class Scan:
    """What `scan_images` found.

    Attributes:
        rows: one an image that could be read, fields as in `report.SCORE_FIELDS`.
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


def name_images(arguments: Sequence[Path], leave_out: Path | None = None) -> tuple[list[tuple[Path, str]], list[str]]:
    """((file, name of its heat map) of files and folders, each name once; remarks on what was not looked at).

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
    named: list[tuple[Path, str]] = []
    taken: set[str] = set()
    for path, relative in found:
        name, count = str(relative.with_suffix(".png")), 1
        while name in taken:
            count += 1
            name = str(relative.with_name(f"{relative.stem}-{count}.png"))
        taken.add(name)
        named.append((path, name))
    return named, notes


def scan_images(
    detector: AnomalyDetector,
    named: list[tuple[Path, str]],
    output: Path,
    heat_maps: bool,
    threshold: float,
    batch_size: int,
    quiet: bool,
) -> Scan:
    """Score the images and write `scores.csv`, `scores.jsonl` and `heatmaps/` into `output`.

    One image that fails, for whatever reason, leaves the others' rows on the disk, and so does a signal.

    named: as `name_images` gives them.

    Raises:
        Stopped: a signal asked for it; what is done is written.
    """
    scan = Scan()
    paths = [path for path, _ in named]
    with ScoreFiles(output) as files, progress("scoring", len(named), quiet=quiet) as bar:
        start = 0
        for batch in read_batches(paths, detector.image_size, batch_size):
            readable = [named[start + position] for position in batch.used]
            scan.unreadable += [failure.message(paths[start:]) for failure in batch.failures]
            scan.notes += [f"{printable(paths[start + position])}: {note}" for position, note in batch.notes]
            start += batch.size
            predictions = detector.predict_tensors(batch.images) if readable else []
            for (path, name), prediction in zip(readable, predictions, strict=True):
                if not math.isfinite(prediction.score):
                    scan.not_finite.append(f"{printable(path)}: its score is {prediction.score}")
                    continue
                picture = None
                if heat_maps:
                    picture = _draw(detector, path, output / "heatmaps" / name, prediction.anomaly_map, scan)
                row = {
                    "image": str(path),
                    "score": prediction.score,
                    "label": int(prediction.score > threshold),
                    "threshold": threshold,
                    "heat_map": picture,
                }
                files.add(row)
                scan.rows.append(row)
            bar.update(batch.size)
            stop_if_asked()
    return scan


def _draw(detector: AnomalyDetector, path: Path, target: Path, anomaly_map: Any, scan: Scan) -> str | None:
    try:
        picture = heat_map(read_image(path), anomaly_map, detector.calibration.color_range)
        return str(write_png(picture, target))
    except (UnreadableImage, OSError, MemoryError) as error:
        scan.not_drawn.append(f"{printable(path)}: no heat map ({printable(error)})")
        return None
