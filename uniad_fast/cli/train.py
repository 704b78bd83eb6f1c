"""uniad-fast train: good images in, a bundle out; interrupted, it goes on."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import typer

from ..data.datasets import load_dataset
from ..data.samples import DataError, Dataset
from ..detect.bundle import check_writable
from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..files import locked
from ..image_size import Size
from ..packages import require
from ..printable import printable
from ..signals import Stopped
from ..training.processes import current, restarted, run_id
from ..training.recipes import RECIPES
from ..training.run_files import ResumeError
from . import train_options as options
from .options import (
    AllGood,
    CacheDirectory,
    CachePrecision,
    DataArgument,
    Device,
    FalseAlarmRate,
    ImageRoot,
    ImageSize,
    MaxPixels,
    NoCache,
    Quiet,
    Roi,
    Seed,
    cache_of,
    finish,
    list_problems,
    recognition_sentence,
    say,
    show_data,
    threshold_sentence,
)

_THE_BUNDLE_S = (
    "recipe", "epochs", "backbone", "backbone_weights", "image_size", "residual_score", "image_score",
    "false_alarm_rate", "held_out", "seed", "sampling", "cache_precision", "tile", "overlap", "aligned",
)  # fmt: skip
_OVERLAP = 0.25
_TRAINING, _LOCK = "uniad_fast training", "lock"
_IN_TRAINING = {_TRAINING, _LOCK, "checkpoint.pt", "log.csv"}


def train(
    context: typer.Context,
    data: DataArgument,
    output: options.Output,
    recipe: options.RecipeOfTraining = "fast",
    epochs: options.Epochs = None,
    backbone: options.Backbone = "tf_efficientnet_b4",
    backbone_weights: options.BackboneWeights = None,
    image_size: ImageSize = "224",
    tile: options.Tile = None,
    overlap: options.Overlap = None,
    aligned: options.Aligned = False,
    residual_score: options.ResidualScoreOrNone = None,
    image_score: options.ImageScoreOfTraining = "max",
    false_alarm_rate: FalseAlarmRate = 0.01,
    held_out: options.HeldOut = 0.1,
    roi: Roi = None,
    add_to: options.AddTo = None,
    seed: Seed = 0,
    logger: options.Logger = None,
    resume: options.Resume = False,
    restart: options.Restart = False,
    all_good: AllGood = False,
    image_root: ImageRoot = None,
    max_pixels: MaxPixels = None,
    cache: CacheDirectory = None,
    no_cache: NoCache = False,
    cache_precision: CachePrecision = "float32",
    sampling: options.Sampling = "all",
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Learn from good images; write a bundle.

    Killed at any moment, it goes on with --resume, to the same result. Started by torchrun, its processes train one
    network, and go on by themselves when torchrun starts them again. Exit code: 0 done, 2 an error, 3 done without
    some images that could not be read, 128 + n stopped by a signal.
    """
    _check_ways(resume, restart)
    if add_to is not None:
        detector = _going_on(context, add_to, device, cache_of(cache, no_cache))
    else:
        size, shared = _size_and_overlap(context, image_size, tile, overlap)
        detector = AnomalyDetector(
            backbone, size, overlap=shared, aligned=aligned, backbone_weights=backbone_weights,
            recipe=replace(RECIPES[recipe].with_epochs(epochs), sampling=sampling), feature_precision=cache_precision,
            residual_score=residual_score or "", image_score=image_score, false_alarm_rate=false_alarm_rate,
            held_out=held_out, seed=seed, device=device, cache_dir=cache_of(cache, no_cache),
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


def _check_ways(resume: bool, restart: bool) -> None:
    if resume and restart:
        raise UniadFastError("--resume goes on with a run and --restart drops it: give one of them")


def _size_and_overlap(
    context: typer.Context, image_size: Size, tile: Size | None, overlap: float | None
) -> tuple[Size, float | None]:
    """(size that the network sees, overlap of tiles of that size or None); UniadFastError for what does not go
    together.
    """
    if tile is None:
        if overlap is not None:
            raise UniadFastError(f"--overlap {overlap} is of tiles, and there is no --tile")
        return image_size, None
    if getattr(context.get_parameter_source("image_size"), "name", "DEFAULT") != "DEFAULT":
        raise UniadFastError("--image-size is what pictures are resized to, and --tile cuts them: give one of them")
    return tile, _OVERLAP if overlap is None else overlap


def _going_on(
    context: typer.Context, bundle: Path, device: str | None, cache: Path | Literal[False] | None
) -> AnomalyDetector:
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
    if not current().is_first:
        (detector.add if detector.classes else detector.fit)(dataset, resume=resume, quiet=quiet)
        return
    check_writable(output)
    work_dir = output.with_name(f"{output.name}.training")
    _check_work_dir(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    if _goes_on(work_dir / _TRAINING):  # torchrun gives the same command again
        resume, restart = True, False
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
                say("no step was done; features that were extracted are kept, but for the last few images", err=True)
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


def _goes_on(mark: Path) -> bool:
    """Whether these processes were at this training before torchrun started them again; marks it as theirs."""
    before = mark.read_text(encoding="utf-8") if mark.exists() else ""
    mark.write_text(run_id(), encoding="utf-8")
    return restarted(before)


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
