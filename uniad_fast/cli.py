"""The command line: uniad-fast demo | train | eval | score | convert | doctor."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from . import report
from .bundle import check_writable
from .cli_convert import convert
from .cli_options import (
    ERROR,
    BatchSize,
    CacheDirectory,
    DataArgument,
    Device,
    ImageRoot,
    ImageScore,
    Quiet,
    RecipeName,
    Score,
    exit_if_unreadable,
    reports_errors,
)
from .data import DataError, Dataset, load_dataset
from .demo import picture_most_defective, thin_out
from .detector import AnomalyDetector
from .doctor import diagnose
from .evaluation import evaluate
from .recipes import RECIPES
from .scan import name_images, scan_images
from .studies.cli import data_app, study
from .training import ResumeError

app = typer.Typer(
    help="Find and locate visual defects: one model for many product classes, trained from good images only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
@reports_errors
def train(
    data: DataArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write the trained detector to.")
    ],
    recipe: Annotated[RecipeName, typer.Option(help="How to train.")] = "fast",
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    backbone: Annotated[str, typer.Option(help="Any timm model that gives features.")] = "tf_efficientnet_b4",
    backbone_weights: Annotated[
        Path | None, typer.Option(help="Its weights: .pth or .safetensors, timm's or EfficientNet-PyTorch's names.")
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=32, help="Side in pixels of the square that images are resized to.")
    ] = 224,
    score: Annotated[Score | None, typer.Option(help="How a residual becomes a number. Default: the recipe's.")] = None,
    image_score: Annotated[
        ImageScore, typer.Option(help="How a map becomes the image's score; mean suits defects all over the image.")
    ] = "max",
    false_alarm_rate: Annotated[float, typer.Option(help="Share of good images that may be called defective.")] = 0.01,
    held_out: Annotated[float, typer.Option(help="Share of the good images kept back to set the threshold.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of this command.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away.")] = False,
    image_root: ImageRoot = None,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Learn from good images; write a bundle.

    Killed at any moment, it goes on with --resume, to the same result.
    """
    dataset = load_dataset(data, image_root, seed)
    detector = AnomalyDetector(
        backbone,
        image_size,
        backbone_weights=backbone_weights,
        recipe=RECIPES[recipe].with_epochs(epochs),
        score=score,
        image_score=image_score,
        false_alarm_rate=false_alarm_rate,
        held_out=held_out,
        seed=seed,
        device=device,
        cache_dir=cache,
    )
    _fit_and_save(detector, dataset, output, resume, restart, quiet)
    if dataset.test:
        typer.echo(f"test it: uniad-fast eval {output} {data}")


@app.command("eval")
@reports_errors
def evaluate_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    data: DataArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for metrics.json, metrics.csv and scores.csv.")
    ] = None,
    save_reconstructions: Annotated[
        Path | None, typer.Option(help="Folder for the reconstructed feature maps, one .npy an image.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split of elpv. Default: the bundle's.")] = None,
    image_root: ImageRoot = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure a bundle on labelled test images."""
    detector = AnomalyDetector.load(bundle, device)
    dataset = load_dataset(data, image_root, detector.seed if seed is None else seed)
    if not dataset.test:
        raise DataError(f"{data} has no test images")
    evaluation = evaluate(detector, dataset.test, reconstructions_dir=save_reconstructions, quiet=quiet)
    typer.echo(report.evaluation_table(evaluation))
    if output is not None:
        for path in report.write_evaluation(evaluation, output):
            typer.echo(f"wrote {path}")
    exit_if_unreadable(evaluation.unreadable)


@app.command()
@reports_errors
def score(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scores.csv, scores.jsonl and heatmaps/.")],
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's.")] = None,
    heat_maps: Annotated[bool, typer.Option(help="Write a heat map for each image.")] = True,
    batch_size: BatchSize = 16,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Score images with a bundle.

    Exit code: 0 all good, 1 something is defective, 2 an error (an image that can't be read is one; the rest are
    still scored).
    """
    detector = AnomalyDetector.load(bundle, device)
    if not detector.is_calibrated and (heat_maps or threshold is None):
        raise ValueError(
            f"{bundle} has no threshold and no colours: convert it with --good GOOD_IMAGES, "
            "or give --threshold and --no-heat-maps"
        )
    limit = detector.calibration.threshold if threshold is None else threshold
    named = name_images(images)
    rows, unreadable = scan_images(
        detector, named, output / "heatmaps" if heat_maps else None, limit, batch_size, quiet
    )
    rows_by_score = sorted(rows, key=lambda row: -row["score"])
    for row in rows_by_score[:20]:
        typer.echo(f"{row['score']:10.4f}  {'DEFECTIVE' if row['label'] else 'good':9}  {row['image']}")
    if len(rows) > 20:
        typer.echo(f"... and {len(rows) - 20} more with lower scores")
    defective = sum(row["label"] for row in rows)
    typer.echo(f"{defective} of {len(rows)} images are defective (score above {limit:.4f})")
    for path in report.write_scores(rows, output):
        typer.echo(f"wrote {path}")
    exit_if_unreadable(unreadable)
    raise typer.Exit(1 if defective else 0)


@app.command()
@reports_errors
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that it writes.")] = Path(
        "uniad-demo"
    ),
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the fast recipe's.")] = None,
    images_per_class: Annotated[int | None, typer.Option(min=4, help="Use only so many, for a quick look.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train and test on real photographs of solar cells (the extra [demo] brings data and weights)."""
    started = time.monotonic()
    dataset = load_dataset("elpv", seed=seed)
    if images_per_class:
        dataset = thin_out(dataset, images_per_class)
    detector = AnomalyDetector(
        "tf_efficientnet_lite0",
        128,  # of the cells' 300 pixels: no worse than 224, in a third of the time
        recipe=RECIPES["fast"].with_epochs(epochs),
        seed=seed,
        device=device,
        cache_dir=cache,
    )
    bundle = output / "bundle"
    _fit_and_save(detector, dataset, bundle, resume, restart=not resume, quiet=quiet)
    evaluation = evaluate(detector, dataset.test, quiet=quiet)
    typer.echo("\n" + report.evaluation_table(evaluation) + "\n")
    for path in report.write_evaluation(evaluation, output):
        typer.echo(f"wrote {path}")
    pictures = picture_most_defective(detector, evaluation, output / "heatmaps")
    typer.echo(f"wrote {len(pictures)} heat maps of the most defective cells to {output / 'heatmaps'}")
    typer.echo(f"score your own images with: uniad-fast score {bundle} IMAGES -o OUT")
    typer.echo(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    exit_if_unreadable([*detector.unreadable, *evaluation.unreadable])


@app.command()
@reports_errors
def doctor() -> None:
    """Say what runs on this machine, and what does not and why."""
    lines, sound = diagnose()
    typer.echo("\n".join(lines))
    raise typer.Exit(0 if sound else ERROR)


app.command()(reports_errors(convert))
app.command()(reports_errors(study))
app.add_typer(data_app, name="data")


def _fit_and_save(
    detector: AnomalyDetector, dataset: Dataset, output: Path, resume: bool, restart: bool, quiet: bool
) -> None:
    """Train with checkpoints beside the bundle-to-be, write the bundle, drop the checkpoints."""
    check_writable(output)
    work_dir = output.with_name(f"{output.name}.training")
    if (work_dir / "checkpoint.pt").exists() and not resume:
        if not restart:
            raise ResumeError(f"{work_dir} holds an interrupted run: go on with --resume, or drop it with --restart")
        shutil.rmtree(work_dir)
    classes = {sample.class_name for sample in dataset.train}
    typer.echo(f"{dataset.name}: {len(dataset.train)} good images of {len(classes)} classes to learn from")
    try:
        detector.fit(dataset, work_dir=work_dir, resume=resume, quiet=quiet)
    except KeyboardInterrupt:
        typer.echo(f"what was done is in {work_dir}: the same command with --resume goes on from there", err=True)
        raise
    detector.save(output)
    shutil.rmtree(work_dir)
    calibration = detector.calibration
    typer.echo(
        f"wrote {output}; threshold {calibration.threshold:.4f} from {calibration.held_out_images} held-out good "
        f"images, at most {calibration.held_false_alarm_rate:.1%} false alarms"
    )
    if calibration.held_false_alarm_rate > detector.false_alarm_rate:
        typer.echo(f"(too few held-out images to promise the {detector.false_alarm_rate:.1%} asked for)")
    for message in detector.unreadable:
        typer.echo(f"left out: {message}", err=True)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
