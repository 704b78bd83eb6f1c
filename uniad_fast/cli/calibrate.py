"""uniad-fast calibrate: the threshold of a bundle anew, from good images."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.datasets import load_dataset
from ..data.samples import DataError
from ..detect.bundle import check_writable
from ..detect.detector import AnomalyDetector
from ..signals import stop_if_asked
from .options import (
    AllGood,
    CacheDirectory,
    DataArgument,
    Device,
    ImageRoot,
    MaxPixels,
    Quiet,
    finish,
    say,
    show_data,
    threshold_sentence,
)


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    data: DataArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="BUNDLE", help="Bundle to write. Default: the same.")
    ] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Share of good images that may be called defective. Default: the bundle's.")
    ] = None,
    all_good: AllGood = False,
    image_root: ImageRoot = None,
    max_pixels: MaxPixels = None,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Set a bundle's threshold and colours from good images that it was not trained on.

    Exit code: 0 done, 2 an error, 3 done without some images that could not be read.
    """
    target = bundle if output is None else output
    detector = AnomalyDetector.load(bundle, device)  # first: what is no bundle is blamed for that
    check_writable(target)
    detector.cache_dir = cache
    dataset = load_dataset(data, image_root, detector.settings.seed, all_good)
    if not dataset.train:
        raise DataError(f"{data} has no good image to set a threshold from")
    show_data(dataset)
    before = detector.calibration.threshold.value if detector.is_calibrated else None
    detector.calibrate(dataset, false_alarm_rate=false_alarm_rate, quiet=quiet)
    stop_if_asked()  # what it has is as it was
    detector.save(target)
    was = "it had none" if before is None else f"it was {before:.4f}"
    say(f"wrote {target}; {threshold_sentence(detector)} ({was})")
    finish(detector.unreadable)
