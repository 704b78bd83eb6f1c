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
from ..detect.results import table
from ..errors import UniadFastError
from ..files import atomic_path
from .options import check_folder, finish, say

_SUFFIX = ".parity.json"


def export(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, .xml or .pt2.")],
    format: Annotated[Literal["onnx", "openvino", "torch"], typer.Option(help="Of the file.")] = "onnx",
    precision: Annotated[
        Literal["float32", "float16"], typer.Option(help="Of the weights; float16 for openvino alone.")
    ] = "float32",
    images: Annotated[Literal["uint8", "float32"], typer.Option(help="Of the input: 0 to 255, or 0 to 1.")] = "uint8",
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
    metadata = export_detector(detector.trained, output, format, precision, images)
    say(f"wrote {output}: {format}, {precision}, {images} images of any size, threshold {metadata['threshold']:.4f}")
    if paths:
        _check(detector, output, paths, BOUNDS[precision])
    finish([])


def _check(detector: AnomalyDetector, output: Path, paths: list[Path], bound: float) -> None:
    """Print the comparison and store it beside the file; an error where the file differs by more than `bound`."""
    exported = load_exported(output, trusted=True)  # it was written just now
    found = compare(detector, exported, paths)
    header = ["batch", "images", "largest difference of a score", "of a map", "other labels", "other classes"]
    say(table(header, [[str(p.batch), str(p.images), f"{p.score:.2g}", f"{p.map:.2g}", str(p.labels), str(p.classes)]
                       for p in found]))  # fmt: skip
    content = {
        "engine": exported.engine,
        "bound": bound,
        "metadata": exported.metadata,
        "parity": [asdict(p) for p in found],
    }
    target = output.with_name(output.name + _SUFFIX)
    with atomic_path(target) as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    say(
        f"wrote {target}; {exported.engine} may differ by {bound} standard deviations of good images, on "
        "images that it resizes by five times that"
    )
    if not all(parity.within(bound) for parity in found):
        raise UniadFastError(f"{output} differs from the detector by more than it may: do not use it")
