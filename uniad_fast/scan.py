"""Score image files and folders: a row an image, a heat-map file an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import DataError
from .detector import AnomalyDetector
from .features import read_batches
from .heatmap import heat_map
from .images import list_images, read_image
from .progress import progress
from .report import write_png


def name_images(arguments: Sequence[Path]) -> list[tuple[Path, str]]:
    """(file, name for its heat map) of files and folders, each name once.

    Raises:
        DataError: there is no image at all.
    """
    found: list[tuple[Path, Path]] = []
    for argument in arguments:
        if argument.is_dir():
            found += [(path, path.relative_to(argument)) for path in list_images(argument)]
        else:
            found.append((argument, Path(argument.name)))
    if not found:
        raise DataError(f"no images in {', '.join(map(str, arguments))}")
    named: list[tuple[Path, str]] = []
    taken: set[str] = set()
    for path, relative in found:
        name, count = str(relative), 1
        while name in taken:
            count += 1
            name = str(relative.with_name(f"{relative.stem}-{count}{relative.suffix}"))
        taken.add(name)
        named.append((path, name))
    return named


def scan_images(
    detector: AnomalyDetector,
    named: list[tuple[Path, str]],
    heat_map_dir: Path | None,
    threshold: float,
    batch_size: int,
    quiet: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row (`report.SCORE_FIELDS`) for each image that can be read, and a message for each that can't.

    named: as `name_images` gives them. heat_map_dir: heat maps go there; None for none.
    """
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    with progress("scoring", len(named), quiet=quiet) as bar:
        start = 0
        for batch in read_batches([path for path, _ in named], detector.image_size, batch_size):
            readable = [named[start + position] for position in batch.used]
            start += batch.size
            predictions = detector.predict_tensors(batch.images) if readable else []
            for (path, name), prediction in zip(readable, predictions, strict=True):
                picture = None
                if heat_map_dir is not None:
                    picture = write_png(
                        heat_map(read_image(path), prediction.anomaly_map, detector.calibration.color_range),
                        heat_map_dir / f"{name}.png",
                    )
                rows.append(
                    {
                        "image": str(path),
                        "score": prediction.score,
                        "label": int(prediction.score > threshold),
                        "threshold": threshold,
                        "heat_map": None if picture is None else str(picture),
                    }
                )
            unreadable += batch.unreadable
            bar.update(batch.size)
    return rows, unreadable
