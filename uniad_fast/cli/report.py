"""uniad-fast report: a page to look at."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.datasets import load_dataset
from ..data.image_files import find_images
from ..data.samples import DataError
from ..deploy.report import Shown, write_report
from ..detect.detector import AnomalyDetector
from .options import (
    DataArgument,
    Device,
    EngineName,
    ImageRoot,
    MaxPixels,
    Quiet,
    Roi,
    check_folder,
    finish,
    list_problems,
    say,
    set_engine,
)

_BATCH = 32


def report(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="DATA is a folder of images of which nothing is known.")
    ] = False,
    roi: Roi = None,
    engine: EngineName = "auto",
    image_root: ImageRoot = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Write one page with all test images, their maps, and a threshold to move; it opens from disk, without a network.

    Exit code: 0 done, 2 an error, 3 done without some images that could not be read.
    """
    check_folder(output.parent)
    detector = AnomalyDetector.load(bundle, device)
    if roi is not None:
        detector.look_at(roi)
    if unlabelled:
        found = find_images(Path(data))
        images = [Shown(path) for path in found.images]
        list_problems("note", found.problems)
    else:
        images = [
            Shown.of(sample) for sample in load_dataset(data, image_root, detector.settings.seed, only_test=True).test
        ]
    if not images:
        hint = "" if unlabelled else "; of a folder of images without labels, say --unlabelled"
        raise DataError(f"{data} has no {'images' if unlabelled else 'test images'}{hint}")
    set_engine(detector, engine, "float32", [one.path for one in images], _BATCH, quiet)
    title = f"{Path(bundle).name} on {Path(data).name}"
    written = write_report(detector, images, output, title, quiet=quiet)
    list_problems("note", written.notes)
    say(f"wrote {output}: {written.images} images; open it in a browser")
    finish(written.unreadable)
