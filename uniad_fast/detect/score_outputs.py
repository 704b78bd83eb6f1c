"""Scores of image files and folders on disk: a row an image, a heat-map file an image."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.image_batches import BATCH
from ..data.image_files import find_images
from ..data.samples import DataError
from ..files import atomic_path
from ..printable import printable
from ..training.batches import share
from ..training.processes import current
from .detector import AnomalyDetector
from .pace import Pace
from .picture import draw_picture, map_image
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
        pace: how fast it went.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    not_drawn: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)

    def join(self, other: "Scored") -> None:
        """Take what another process found, too."""
        for name in ("rows", "unreadable", "not_finite", "not_drawn", "notes"):
            getattr(self, name).extend(getattr(other, name))

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


@dataclass(frozen=True)
class Wanted:
    """What is written of each image beside its scores.

    Attributes:
        heat_maps: a picture, see `draw_picture`.
        maps: the map alone into `maps/`, as "png" (16 bits, see `map_image`) or "npy" (float32, of the network's own
            size); None for none.
        min_area: pixels that a region must have to be listed.
    """

    heat_maps: bool = True
    maps: str | None = None
    min_area: float = 0


def write_scores(
    detector: AnomalyDetector,
    named: Sequence[NamedImage],
    output: Path,
    threshold: float,
    *,
    wanted: Wanted = Wanted(),  # noqa: B008  it does not change
    batch_size: int = BATCH,
    quiet: bool = False,
) -> Scored:
    """Score the images and write `scores.csv`, `scores.jsonl` and `heatmaps/` into `output`.

    One image that fails, for whatever reason, leaves the others' rows on the disk, and so does a signal.

    Of several processes each scores its share; the first one writes all rows, the others' at the end.

    Args:
        named: as `name_images` gives them.
        threshold: image score above which an image is defective.
        wanted: what is written beside the scores.

    Raises:
        Stopped: a signal asked for it; what is done is written.
    """
    found, together = Scored(), current()
    named = named[slice(*share(len(named), together.part))]
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(ScoreFiles(output)) if together.is_first else None
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        draw = partial(_draw, detector, output, threshold, wanted)
        writer = _Writer(named, threshold, wanted.min_area, files, partial(pool.submit, draw), found)
        scored = score_files(
            detector,
            [one.path for one in named],
            threshold=threshold,
            classes=[one.class_name for one in named],
            batch_size=batch_size,
            keep_pictures=wanted.heat_maps,
            pace=found.pace,
            quiet=quiet,
        )
        try:
            for batch in scored:
                found.unreadable += batch.unreadable
                found.notes += batch.notes
                with found.pace.stage("drawing and writing"):
                    writer.take(batch.images)
        finally:
            with found.pace.stage("drawing and writing"):
                writer.finish()
        for other in together.gather(found)[1:]:
            if files is not None:
                for row in other.rows:
                    files.add(row)
            found.join(other)
    return found


@dataclass
class _Writer:
    """Draws the pictures of a batch while the next one is measured, and writes its rows then."""

    named: Sequence[NamedImage]
    threshold: float
    min_area: float
    files: ScoreFiles | None
    draw: Callable[[ScoredImage, str], Future[str | None]]
    found: Scored
    drawing: list[tuple[ScoredImage, Future[str | None]]] = field(default_factory=list)

    def take(self, images: Sequence[ScoredImage]) -> None:
        """Begin to draw these, once those before are written."""
        self.finish()
        for image in images:
            if not math.isfinite(image.prediction.score):
                self.found.not_finite.append(f"{printable(image.path)}: its score is {image.prediction.score}")
                continue
            self.drawing.append((image, self.draw(image, self.named[image.number].heat_map)))

    def finish(self) -> None:
        """Write the rows of what has been taken, as soon as their pictures are drawn."""
        begun, self.drawing = self.drawing, []
        for image, future in begun:
            prediction = image.prediction
            row = {
                "image": str(image.path),
                "class": prediction.class_name,
                "score": prediction.score,
                "label": int(bool(prediction.label)),
                "threshold": self.threshold,
                "heat_map": self._drawn(image, future),
                "regions": [region.to_json() for region in prediction.regions if region.area >= self.min_area],
            }
            if self.files is not None:
                self.files.add(row)
            self.found.rows.append(row)

    def _drawn(self, image: ScoredImage, future: Future[str | None]) -> str | None:
        try:
            return future.result()
        except (OSError, MemoryError) as error:
            self.found.not_drawn.append(f"{printable(image.path)}: no heat map ({printable(error)})")
            return None


def _draw(
    detector: AnomalyDetector,
    output: Path,
    threshold: float,
    wanted: Wanted,
    image: ScoredImage,
    name: str,
) -> str | None:
    """The heat map's file, where one is wanted."""
    prediction = image.prediction
    if wanted.maps == "npy":
        target = (output / "maps" / name).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial_path, open(partial_path, "wb") as file:
            np.save(file, prediction.anomaly_map)
    elif wanted.maps == "png":
        height, width = image.size
        write_png(map_image(prediction.anomaly_map, (width, height)), output / "maps" / name)
    if not wanted.heat_maps:
        return None
    assert image.picture is not None
    drawn = draw_picture(image.picture, prediction, detector.calibration, threshold)
    return str(write_png(drawn, output / "heatmaps" / name))
