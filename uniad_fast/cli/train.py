"""uniad-fast train: good images in, a bundle out; interrupted, it goes on."""

import shlex
import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..data.datasets import load_dataset
from ..data.samples import DataError, Dataset
from ..detect.bundle import check_writable
from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..files import locked
from ..packages import require
from ..printable import printable
from ..signals import Stopped
from ..training.recipes import RECIPES
from ..training.run_files import ResumeError
from .options import (
    AllGood,
    CacheDirectory,
    DataArgument,
    Device,
    FalseAlarmRate,
    ImageRoot,
    ImageScore,
    ImageSize,
    MaxPixels,
    Quiet,
    RecipeName,
    ResidualScore,
    Roi,
    Seed,
    finish,
    list_problems,
    recognition_sentence,
    say,
    show_data,
    threshold_sentence,
)

_THE_BUNDLE_S = (
    "recipe", "epochs", "backbone", "backbone_weights", "image_size", "residual_score", "image_score",
    "false_alarm_rate", "held_out", "seed",
)  # fmt: skip
_TRAINING, _LOCK = "uniad_fast training", "lock"
_IN_TRAINING = {_TRAINING, _LOCK, "checkpoint.pt", "log.csv"}


_AddTo = Annotated[
    Path | None, typer.Option(metavar="BUNDLE", help="Go on from this bundle; DATA has its classes and new ones.")
]

_Logger = Annotated[
    Literal["tensorboard"] | None, typer.Option(help="Also log to BUNDLE.tensorboard, for TensorBoard.")
]


def train(
    context: typer.Context,
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
    image_size: ImageSize = "224",
    residual_score: Annotated[
        ResidualScore | None, typer.Option(help="How a residual becomes a number. Default: the recipe's.")
    ] = None,
    image_score: Annotated[
        ImageScore, typer.Option(help="How a map becomes the image's score; mean suits defects all over the image.")
    ] = "max",
    false_alarm_rate: FalseAlarmRate = 0.01,
    held_out: Annotated[float, typer.Option(help="Share of the good images that the network is not trained on.")] = 0.1,
    roi: Roi = None,
    add_to: _AddTo = None,
    seed: Seed = 0,
    logger: _Logger = None,
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
    if add_to is not None:
        detector = _going_on(context, add_to, device, cache)
    else:
        detector = AnomalyDetector(
            backbone, image_size, backbone_weights=backbone_weights, recipe=RECIPES[recipe].with_epochs(epochs),
            residual_score=residual_score or "", image_score=image_score, false_alarm_rate=false_alarm_rate,
            held_out=held_out, seed=seed, device=device, cache_dir=cache,
        )  # fmt: skip
    if roi is not None:
        detector.look_at(roi)
    dataset = load_dataset(data, image_root, detector.settings.seed, all_good)
    if not dataset.train:
        raise DataError(f"{data} has no good image to learn from")
    show_data(dataset)
    fit_and_save(detector, dataset, output, resume, restart, quiet, logger)
    if dataset.test:
        _say_how_to_test(output, data, image_root)
    finish(detector.unreadable)


def _going_on(context: typer.Context, bundle: Path, device: str | None, cache: Path | None) -> AnomalyDetector:
    """The detector to go on from; UniadFastError for options that are its bundle's to say."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in _THE_BUNDLE_S
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    ]
    if given:
        raise UniadFastError(f"--add-to goes on as its bundle was trained: {', '.join(given)} would not be followed")
    detector = AnomalyDetector.load(bundle, device)
    detector.cache_dir = cache
    return detector


def _say_how_to_test(bundle: Path, data: str, image_root: Path | None) -> None:
    root = ["--image-root", str(image_root)] if image_root else []
    say(f"test it: {shlex.join(['uniad-fast', 'eval', str(bundle), data, *root])}")


def fit_and_save(
    detector: AnomalyDetector,
    dataset: Dataset,
    output: Path,
    resume: bool,
    restart: bool,
    quiet: bool,
    logger: str | None = None,
) -> None:
    """Train with checkpoints beside the bundle-to-be, write the bundle, drop the checkpoints."""
    if logger is not None:
        require("tensorboard")
    output = output.absolute() if output.name else output.resolve()
    events = None if logger is None else output.with_name(f"{output.name}.tensorboard")
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
            learn = detector.add if detector.classes else detector.fit
            learn(dataset, work_dir=work_dir, resume=resume, events_dir=events, quiet=quiet)
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
    say(f"wrote {output}; {threshold_sentence(detector)}")
    if events is not None:
        say(f"wrote {events}; look with: {shlex.join(['tensorboard', '--logdir', str(events)])}")
    if (sentence := recognition_sentence(detector)) is not None:
        say(sentence)
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
