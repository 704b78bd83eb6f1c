"""uniad-fast eval: how good a bundle is on labelled test images."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data.datasets import load_dataset
from ..data.image_batches import BATCH
from ..data.samples import DataError, Dataset
from ..detect import results
from ..detect.beside import beside
from ..detect.detector import AnomalyDetector
from ..detect.evaluation import Evaluation, evaluate
from ..detect.result_pictures import draw_results
from ..printable import printable
from ..training.processes import current
from .options import (
    ERROR,
    INCOMPLETE,
    CacheDirectory,
    DataArgument,
    Device,
    EngineName,
    EnginePrecision,
    ImageRoot,
    MaxPixels,
    Quiet,
    Roi,
    check_folder,
    list_problems,
    say,
    set_engine,
    show_data,
)


def evaluate_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    data: DataArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for metrics.json, metrics.csv, decisions.csv, scores.csv and pictures/."
        ),
    ] = None,
    save_reconstructions: Annotated[
        Path | None, typer.Option(help="Folder for the reconstructed feature maps, one .npy an image.")
    ] = None,
    class_from: Annotated[
        Literal["image", "data"], typer.Option(help="image: the class is recognized, as in use. data: it is told.")
    ] = "image",
    roi: Roi = None,
    beside_others: Annotated[
        bool,
        typer.Option("--beside", help="Also measure what the features alone and a memory of them are worth."),
    ] = False,
    cache: CacheDirectory = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Of the split, where data bring none. Default: the bundle's."),
    ] = None,
    image_root: ImageRoot = None,
    engine: EngineName = "auto",
    engine_precision: EnginePrecision = "float32",
    max_pixels: MaxPixels = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure a bundle on labelled test images.

    Exit code: 0 done, 2 an error (a score that is not finite is one), 3 done without some that could not be read.
    """
    check_folder(output, alone=True)
    check_folder(save_reconstructions)
    detector = AnomalyDetector.load(bundle, device)
    dataset = load_dataset(data, image_root, detector.settings.seed if seed is None else seed, only_test=True)
    if not dataset.test:
        raise DataError(f"{data} has no test images")
    show_data(dataset)
    if roi is not None:
        detector.look_at(roi)
    set_engine(detector, engine, engine_precision, [sample.path for sample in dataset.test], BATCH, quiet)
    told = class_from == "data"
    options: dict[str, Any] = {"class_from_data": told, "reconstructions_dir": save_reconstructions, "quiet": quiet}
    evaluation = evaluate(detector, dataset.test, **options)
    say(results.evaluation_table(evaluation))
    if beside_others:
        detector.cache_dir = cache
        say("\n" + _compared(detector, dataset, evaluation, told, quiet))
    if evaluation.decisions is not None:
        say("\n" + results.decisions_table(evaluation.decisions) + "\n")
    not_drawn = _write(detector, evaluation, output, told) if output is not None and current().is_first else []
    list_problems("left out", evaluation.unreadable)
    list_problems("not finite", evaluation.not_finite)
    raise typer.Exit(ERROR if evaluation.not_finite else INCOMPLETE if evaluation.unreadable or not_drawn else 0)


def _write(detector: AnomalyDetector, evaluation: Evaluation, output: Path, told: bool) -> list[str]:
    """What could not be drawn, which is said."""
    not_drawn: list[str] = []
    for path in results.write_evaluation(evaluation, output):
        say(f"wrote {path}")
    if detector.is_calibrated:
        pictures, not_drawn = draw_results(detector, evaluation, output / "pictures", told)
        say(f"wrote {len(pictures)} pictures of the worst and best verdicts to {output / 'pictures'}")
        list_problems("not drawn", not_drawn)
    return not_drawn


def _compared(
    detector: AnomalyDetector, dataset: Dataset, evaluation: Evaluation, class_from_data: bool, quiet: bool
) -> str:
    if missing := sorted({s.class_name for s in dataset.test} - {s.class_name for s in dataset.train}):
        raise DataError(f"--beside learns from good images, and there is none of {printable(', '.join(missing[:5]))}")
    others = {
        name: evaluate(other, dataset.test, class_from_data=class_from_data, quiet=quiet)
        for name, other in beside(detector, dataset.train, quiet).items()
    }
    return results.beside_table({"this detector": evaluation, **others})
