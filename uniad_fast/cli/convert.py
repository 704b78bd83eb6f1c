"""uniad-fast convert: other codebases' checkpoints to bundles, and back."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..detect.bundle import check_writable
from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..image_size import in_words
from ..interop.checkpoints import NotInTensors, load, save
from .options import CacheDirectory, Device, FalseAlarmRate, ImageSize, Quiet, finish, say


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint of the public UniAD code or of ADer, a UniAD network's weights, a bundle."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle to write, or with --to the checkpoint.")],
    to: Annotated[
        Literal["uniad", "ader", "reconstruction"] | None, typer.Option(help="Write this layout's names instead.")
    ] = None,
    good: Annotated[
        Path | None, typer.Option(help="Good images it was not trained on, as for train: they set the threshold.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The public code's config.yaml that belongs to it.")] = None,
    backbone: Annotated[str | None, typer.Option(help="timm name, where it can't be told from the tensors.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="Of a checkpoint that has no backbone.")] = None,
    image_size: ImageSize = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, which tensors do not tell. Default: 8.")
    ] = None,
    window: Annotated[
        tuple[int, int] | None, typer.Option(help="Hidden window, height and width. Default: half of the grid.")
    ] = None,
    false_alarm_rate: FalseAlarmRate = 0.01,
    cache: CacheDirectory = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint into a bundle that scores images as the original does, or a bundle into a checkpoint.

    A converted detector has no threshold until it has seen good images: give some with --good. It sees images of 16
    times its grid, unless --image-size says another size that gives this grid.
    """
    if to is None:
        check_writable(output)
    _refuse_what_is_said_twice(
        checkpoint, config=config, backbone=backbone, backbone_weights=backbone_weights, image_size=image_size,
        heads=heads, window=window,
    )  # fmt: skip
    found = load(
        checkpoint,
        config=config,
        backbone=backbone,
        backbone_weights=backbone_weights,
        image_size=image_size,
        not_in_tensors=NotInTensors(8 if heads is None else heads, window),
        device=device,
    )
    if good is not None:
        found.cache_dir = cache
        found.calibrate(good, false_alarm_rate=false_alarm_rate, quiet=quiet)
    if to is not None:
        differs = save(found, output, to)
        say(f"wrote {output}")
        for sentence in differs:
            say(f"differs there: {sentence}")
    else:
        found.save(output)
        say(f"wrote {output}: {_described(found)}")
    finish(found.unreadable)


def _refuse_what_is_said_twice(checkpoint: Path, **options: Any) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if checkpoint.is_dir() and named:
        raise UniadFastError(
            f"{checkpoint} is a bundle, which says all by itself: {', '.join(named)} would not be followed"
        )
    if "--config" in named and {"--heads", "--window"} & set(named):
        raise UniadFastError("--config says heads and window: give it, or --heads and --window")


def _described(detector: AnomalyDetector) -> str:
    pipeline = detector.pipeline
    backbone, (height, width) = pipeline.backbone, pipeline.model.feature_size
    padding = f", padded for {backbone.padded_for} pixels" if backbone.padded_for else ""
    what = f"{backbone.name}{padding}, {height} x {width} tokens, {in_words(pipeline.image_size)} pixels\n"
    if detector.is_calibrated:
        return what + f"threshold {detector.calibration.threshold.value:.4f}"
    return what + "it has no threshold: give good images with --good, or score with --threshold"
