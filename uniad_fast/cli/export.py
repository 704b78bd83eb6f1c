"""uniad-fast export: a detector as a file for another engine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..data.image_files import list_images
from ..deploy.export import export_detector
from ..deploy.exported import load_exported
from ..deploy.parity import BOUNDS, compare
from ..detect.detector import AnomalyDetector
from ..detect.good_images import good_samples
from ..detect.results import table
from ..errors import UniadFastError
from ..files import atomic_path
from ..signals import stop_if_asked
from .options import check_folder, finish, say

_SUFFIX = ".parity.json"


def export(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, .xml or .pt2.")],
    format: Annotated[Literal["onnx", "openvino", "torch"], typer.Option(help="Of the file.")] = "onnx",
    precision: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="Of the weights, or with int8 of all but resize and scores; those two for openvino alone."),
    ] = "float32",
    images: Annotated[Literal["uint8", "float32"], typer.Option(help="Of the input: 0 to 255, or 0 to 1.")] = "uint8",
    good: Annotated[
        str | None, typer.Option(metavar="DATA", help="Good images that int8 is calibrated on, as for train.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="IMAGES", help="Compare the file with the detector on these images.")
    ] = None,
) -> None:
    """Write the whole detector, resize to verdict, as one file for ONNX Runtime, OpenVINO or torch.export.

    Exit code: 0 done, 2 an error, or a file that differs from the detector by more than it may.
    """
    detector = AnomalyDetector.load(bundle, "cpu")
    check_folder(output.parent)
    paths = list_images(check) if check is not None else []
    if check is not None and not paths:
        raise UniadFastError(f"{check}: no image to compare on")
    calibrated_on = [sample.path for sample in good_samples(good)] if good is not None else []
    stop_if_asked()
    metadata = export_detector(detector.trained, output, format, precision, images, calibrated_on)
    say(f"wrote {output}: {format}, {precision}, {images} images of any size, threshold {metadata['threshold']:.4f}")
    if paths:
        _check(detector, output, paths, precision)
    finish([])


def _check(detector: AnomalyDetector, output: Path, paths: list[Path], precision: str) -> None:
    """Print the comparison and store it beside the file; an error where the file differs by more than it may."""
    bound = BOUNDS[precision]
    exported = load_exported(output, trusted=True)  # it was written just now
    found = compare(detector, exported, paths)
    header = ["batch", "images", "score off by", "median", "map off by", "other labels", "other classes"]
    off = [[f"{value:.2g}" for value in (p.score, p.typical, p.map)] for p in found]
    counts = [([str(p.batch), str(p.images)], [str(p.labels), str(p.classes)]) for p in found]
    say(table(header, [first + figures + last for (first, last), figures in zip(counts, off, strict=True)]))
    content = {
        "engine": exported.engine,
        "bound": bound,
        "metadata": exported.metadata,
        "parity": [asdict(p) for p in found],
    }
    target = output.with_name(output.name + _SUFFIX)
    with atomic_path(target) as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    of_maps = "" if precision == "int8" else ", a map by four times that"
    what = "the median score of int8" if precision == "int8" else exported.engine
    say(
        f"wrote {target}; {what} may differ by {bound} standard deviations of good images{of_maps}, on images that it "
        "resizes by five times as much"
    )
    if not all(parity.within(precision) for parity in found):
        raise UniadFastError(f"{output} differs from the detector by more than it may: do not use it")
