"""uniad-fast convert: other codebases' checkpoints to bundles, and back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..detect.bundle import check_writable
from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..interop.checkpoints import load, save
from .options import CacheDirectory, Device, FalseAlarmRate, Quiet, finish, say


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
    image_size: Annotated[
        int | None, typer.Option(min=32, help="Side of the images. Default: 16 times the grid.")
    ] = None,
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

    A converted detector has no threshold until it has seen good images: give some with --good.
    """
    if to is None:
        check_writable(output)
    given = {
        "--config": config,
        "--backbone": backbone,
        "--backbone-weights": backbone_weights,
        "--image-size": image_size,
        "--heads": heads,
        "--window": window,
    }
    said = [name for name, value in given.items() if value is not None]
    if checkpoint.is_dir() and said:
        raise UniadFastError(
            f"{checkpoint} is a bundle, which says all by itself: {', '.join(said)} would not be followed"
        )
    if config is not None and (heads is not None or window is not None):
        raise UniadFastError("--config says heads and window: give it, or --heads and --window")
    found = load(
        checkpoint,
        config=config,
        backbone=backbone,
        backbone_weights=backbone_weights,
        image_size=image_size,
        nhead=8 if heads is None else heads,
        neighbor_size=window,
        device=device,
    )
    if not isinstance(found, AnomalyDetector):
        raise UniadFastError(
            f"{checkpoint} holds no whole detector, only a {type(found).__name__}: "
            "name the backbone of a network with --backbone; a backbone is for train --backbone-weights"
        )
    if good is not None:
        found.cache_dir = cache
        found.false_alarm_rate = false_alarm_rate
        found.calibrate(good, quiet=quiet)
    if to is not None:
        differs = save(found, output, to)
        say(f"wrote {output}")
        for sentence in differs:
            say(f"differs there: {sentence}")
    else:
        found.save(output)
        scorer = found.scorer
        padding = f", padded for {scorer.backbone.padded_for} pixels" if scorer.backbone.padded_for else ""
        height, width = scorer.model.feature_size
        say(f"wrote {output}: {found.backbone_name}{padding}, {height} x {width} tokens, {found.image_size} pixels")
        if found.is_calibrated:
            say(f"threshold {found.calibration.threshold:.4f}")
        else:
            say("it has no threshold: give good images with --good, or score with --threshold")
    finish(found.unreadable)
