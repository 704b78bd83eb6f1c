"""uniad-fast score: images in, verdicts out."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..data.samples import DataError
from ..detect.detector import AnomalyDetector
from ..detect.score_outputs import NamedImage, Scored, Wanted, name_images, with_classes_of_folders, write_scores
from ..errors import UniadFastError
from ..printable import printable
from .options import (
    DEFECTIVE,
    ERROR,
    INCOMPLETE,
    BatchSize,
    Device,
    EngineName,
    EnginePrecision,
    MaxPixels,
    Quiet,
    Roi,
    check_folder,
    list_problems,
    say,
    set_engine,
)


def score(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    images: Annotated[list[str], typer.Argument(help="Image files, and folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scores.csv, scores.jsonl and heatmaps/.")],
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's.")] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Threshold for this share of good images, instead of the bundle's.")
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="Of all images. Default: it is recognized.")
    ] = None,
    class_from: Annotated[
        Literal["image", "folder"],
        typer.Option(help="image: the class is recognized. folder: a folder above the image is named after it."),
    ] = "image",
    roi: Roi = None,
    heat_maps: Annotated[bool, typer.Option(help="Write a heat map for each image.")] = True,
    maps: Annotated[
        Literal["png", "npy"] | None, typer.Option(help="Also write each map alone: 16-bit PNG, or NumPy's float32.")
    ] = None,
    min_area: Annotated[float, typer.Option(min=0, help="Smallest region to list, in pixels of the image.")] = 0,
    batch_size: BatchSize = 16,
    engine: EngineName = "auto",
    engine_precision: EnginePrecision = "float32",
    max_pixels: MaxPixels = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Score images with a bundle.

    Exit code: 0 all good, 1 something is defective, 2 an error (a score that is not finite is one), 3 some images could
    not be read or drawn; the others are scored, and defects among them are in the files and on the last line.
    """
    _check_choices(images, threshold, false_alarm_rate, class_name is not None and class_from == "folder")
    check_folder(output, alone=True)
    detector = AnomalyDetector.load(bundle, device)
    if not detector.is_calibrated and (heat_maps or threshold is None):
        raise UniadFastError(
            f"{bundle} has no threshold and no colours: convert it with --good GOOD_IMAGES, "
            "or give --threshold and --no-heat-maps"
        )
    limit = _limit(detector, threshold, false_alarm_rate)
    if roi is not None:
        detector.look_at(roi)
    named, notes = _named(detector, images, output, class_name, class_from)
    set_engine(detector, engine, engine_precision, [one.path for one in named], batch_size, quiet)
    wanted = Wanted(heat_maps, maps, min_area)
    found = write_scores(detector, named, output, limit, wanted=wanted, batch_size=batch_size, quiet=quiet)
    _report(found, notes, output, limit, len(named))
    if found.not_finite:
        raise typer.Exit(ERROR)
    if found.unreadable or found.not_drawn:
        raise typer.Exit(INCOMPLETE)
    raise typer.Exit(DEFECTIVE if found.defective else 0)


def _check_choices(
    images: list[str], threshold: float | None, false_alarm_rate: float | None, has_two_classes: bool
) -> None:
    if threshold is not None and not math.isfinite(threshold):
        raise UniadFastError(f"--threshold must be a finite number, got {threshold}")
    if "" in images:
        raise DataError("the name of an image is empty")
    if threshold is not None and false_alarm_rate is not None:
        raise UniadFastError("--false-alarm-rate sets a threshold, and so does --threshold: give one of them")
    if has_two_classes:
        raise UniadFastError("--class says the class of all images: give it, or --class-from folder")


def _limit(detector: AnomalyDetector, threshold: float | None, false_alarm_rate: float | None) -> float:
    if threshold is not None:
        return threshold
    calibration = detector.calibration
    return (calibration.threshold if false_alarm_rate is None else calibration.threshold_at(false_alarm_rate)).value


def _named(
    detector: AnomalyDetector, images: list[str], output: Path, class_name: str | None, class_from: str
) -> tuple[list[NamedImage], list[str]]:
    """The images with what is told of their classes, and remarks."""
    named, notes = name_images([Path(image) for image in images], output)
    if class_name is not None:
        detector.trained.class_number(class_name)
        named = [one._replace(class_name=class_name) for one in named]
    elif class_from == "folder":
        named, unknown = with_classes_of_folders(named, detector.classes)
        notes += unknown
    return named, notes


def _report(found: Scored, notes: list[str], output: Path, limit: float, named: int) -> None:
    for note in notes:
        say(f"note: {note}", err=True)
    list_problems("note", found.notes)
    if not found.rows and not found.not_finite:
        raise DataError(f"none of {named} images could be read" + "".join(f"\n  {m}" for m in found.unreadable[:20]))
    rows_by_score = sorted(found.rows, key=lambda row: -row["score"])
    for row in rows_by_score[:20]:
        verdict = "DEFECTIVE" if row["label"] else "good"
        say(f"{row['score']:10.4f}  {verdict:9}  {printable(row['class'] or '?')}  {printable(row['image'])}")
    if len(found.rows) > 20:
        say(f"... and {len(found.rows) - 20} more with lower scores")
    for name in ("scores.csv", "scores.jsonl"):
        say(f"wrote {output / name}")
    list_problems("left out", found.unreadable)
    list_problems("not finite", found.not_finite)
    list_problems("not drawn", found.not_drawn)
    say(found.pace.summary())
    last = f"{found.defective} of {len(found.rows)} images are defective (score above {limit:.4f})"
    for messages, what in ((found.unreadable, "could not be read"), (found.not_finite, "have no finite score")):
        last += f"; {len(messages)} {what}" if messages else ""
    say(last)
