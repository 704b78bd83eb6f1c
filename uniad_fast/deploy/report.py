"""The report: one HTML page that opens from disk, with all images, their maps, and a threshold to move.

What the page does is in `report_page/`: a template, a style and two scripts, joined here with the data.
"""

import base64
import io
import math
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, features

from ..data.samples import DataError, Sample
from ..detect.detector import AnomalyDetector
from ..detect.heatmap import COLORS
from ..detect.score_files import ScoredImage, score_files
from ..errors import UniadFastError
from ..files import atomic_path
from ..image_size import in_words
from ..printable import printable

_SIDES = ((300, 384), (1500, 256))  # so many images at most: pixels of a thumbnail's longer side
_LEAST_SIDE = 160
_QUALITY = 72
_BOXES = 12
_OWN = {"style": "page.css", "charts": "charts.js", "script": "page.js"}
_PARTS = ("page.html", *_OWN.values())


class Shown(NamedTuple):
    """An image for the report, and what is known of it: None where nobody has said."""

    path: Path
    class_name: str | None = None
    kind: str | None = None
    defective: bool | None = None

    @classmethod
    def of(cls, sample: Sample) -> "Shown":
        """A labelled image."""
        return cls(sample.path, sample.class_name, sample.kind, sample.defective)


class Written(NamedTuple):
    """How many images a report shows, and messages about the others and about what was not seen quite as it is."""

    images: int
    unreadable: list[str]
    notes: list[str]


def write_report(
    detector: AnomalyDetector, images: Sequence[Shown], path: str | os.PathLike, title: str, *, quiet: bool = False
) -> Written:
    """Score the images and write the page, whole or not at all.

    Args:
        images: measured as the class that is recognized.
        title: of the page.

    Raises:
        UniadFastError: the detector has no threshold.
        DataError: no image could be read.
        Stopped: a signal asked for it.
    """
    if not detector.is_calibrated:
        raise UniadFastError("this detector has no threshold: set one first with uniad-fast calibrate")
    root = _common_folder([one.path for one in images])
    side = next((side for most, side in _SIDES if len(images) <= most), _LEAST_SIDE)
    classes = sorted({*detector.classes, *(one.class_name for one in images if one.class_name is not None)})
    kinds = sorted({one.kind for one in images if one.kind is not None})
    rows: list[list[Any]] = []
    unreadable: list[str] = []
    notes: list[str] = []
    for batch in score_files(detector, [one.path for one in images], keep_pictures=True, quiet=quiet):
        unreadable += batch.unreadable
        notes += batch.notes
        for scored in batch.images:
            if math.isfinite(scored.prediction.score):
                name = printable(os.path.relpath(scored.path, root))
                rows.append([name, *_row(detector, scored, images[scored.number], classes, kinds, side)])
            else:
                unreadable.append(f"{printable(scored.path)}: its score is {scored.prediction.score}")
    if not rows:
        raise DataError("no image could be read" + "".join(f"\n  {message}" for message in unreadable[:10]))
    content = _content(detector, rows, classes, kinds)
    about = (
        f"{detector.settings.backbone} at {in_words(detector.settings.image_size)} pixels; {len(rows)} images; scores "
        f"in standard deviations of good images; the detector's threshold promises {content['rate']:.1%} false alarms"
    )
    page = _rendered(title, about, content)
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return Written(len(rows), unreadable, notes)


def _content(detector: AnomalyDetector, rows: list[list[Any]], classes: list[str], kinds: list[str]) -> dict[str, Any]:
    calibration, (height, width) = detector.calibration, detector.pipeline.model.feature_size
    return {
        "threshold": calibration.threshold.value,
        "rate": calibration.threshold.rate,
        "classes": [printable(name) for name in classes],
        "kinds": [printable(name) for name in kinds],
        "grid": [height, width],
        "shape": float(np.median([row[7] / row[6] for row in rows])),
        "colors": COLORS.astype(int).tolist(),
        "thumbnails": _format().lower(),
        "images": rows,
    }


def _row(
    detector: AnomalyDetector, scored: ScoredImage, shown: Shown, classes: list[str], kinds: list[str], side: int
) -> list[Any]:
    prediction, (height, width) = scored.prediction, scored.size
    recognized = -1 if prediction.class_name is None else classes.index(prediction.class_name)
    assert scored.picture is not None
    boxes = [
        [round(edge / whole, 4) for edge, whole in zip(region.box, (width, height) * 2, strict=True)]
        for region in prediction.regions[:_BOXES]
    ]
    return [
        recognized if shown.class_name is None else classes.index(shown.class_name),
        -1 if shown.kind is None else kinds.index(shown.kind),
        -1 if shown.defective is None else int(shown.defective),
        round(prediction.score, 5),
        recognized,
        width,
        height,
        boxes,
        _thumbnail(scored.picture, side),
        _map_of(detector, prediction.anomaly_map),
    ]


def _common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that all of them are in."""
    folders = [path.parent for path in paths]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # some are absolute and some not, or on other drives
        return Path()


def _thumbnail(picture: Image.Image, side: int) -> str:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, _format(), quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _format() -> str:
    return "WEBP" if features.check("webp") else "JPEG"


def _map_of(detector: AnomalyDetector, anomaly_map: np.ndarray) -> str:
    """Levels of the colours at the places of the score map, a byte each: what lies between is interpolated again."""
    rows, cols = (
        np.round(np.linspace(0, side - 1, places)).astype(int)
        for side, places in zip(anomaly_map.shape, detector.pipeline.model.feature_size, strict=True)
    )
    low, high = detector.calibration.color_range
    level = np.clip((anomaly_map[np.ix_(rows, cols)] - low) / max(high - low, 1e-12), 0, 1)
    return base64.b64encode(np.round(level * 255).astype(np.uint8).tobytes()).decode()


def _rendered(title: str, about: str, content: dict[str, Any]) -> str:
    from jinja2 import Environment
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    folder = files(__package__).joinpath("report_page")
    parts = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in _PARTS}
    # What is the page's own goes in as it is; what comes from data is escaped, in the script as JSON without markup.
    own = {name: Markup(parts[file]) for name, file in _OWN.items()}
    data = htmlsafe_json_dumps(content, separators=(",", ":"))
    template = Environment(autoescape=True).from_string(parts[_PARTS[0]])
    return template.render(title=printable(title), about=about, data=data, **own)
