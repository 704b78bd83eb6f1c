"""uniad-fast watch: a folder that fills."""

import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..data.samples import DataError
from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..packages import require
from ..signals import stop_if_asked
from .options import BatchSize, Device, EngineName, check_folder, say


def watch(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    folder: Annotated[Path, typer.Argument(help="Folder whose images are scored, and those that arrive.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scores.csv, scores.jsonl and heatmaps/.")],
    heat_maps: Annotated[bool, typer.Option(help="Write a picture for each image.")] = True,
    on_defect: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Run for each defective image, with its path and score.")
    ] = None,
    settle: Annotated[float, typer.Option(min=0, help="Seconds without a change that make a file complete.")] = 1.0,
    poll: Annotated[bool, typer.Option("--poll", help="Look each second: for shares that send no events.")] = False,
    batch_size: BatchSize = 16,
    engine: EngineName = "auto",
    device: Device = None,
) -> None:
    """Score the images in a folder, and those that arrive, until a signal stops it; started again, it goes on.

    Exit code: 2 an error, 128 + the signal's number when it is stopped.
    """
    require("watchdog")
    from ..deploy.engines import use_engine
    from ..deploy.watch import WatchOptions
    from ..deploy.watch import watch as run

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    check_folder(output)
    command = _command(on_defect)
    detector = AnomalyDetector.load(bundle, device)
    if not detector.is_calibrated:
        raise UniadFastError(f"{bundle} has no threshold: set one first with uniad-fast calibrate")
    use_engine(detector, engine, batch=batch_size)
    options = WatchOptions(settle, batch_size, heat_maps, command, poll)
    say(f"watching {folder}; rows go to {output / 'scores.jsonl'} and {output / 'scores.csv'}", err=True)
    count = run(detector, folder, output, options, say)
    say(f"{count} images scored", err=True)
    stop_if_asked()


def _command(text: str | None) -> tuple[str, ...]:
    """Program and arguments, before anything is watched."""
    if text is None:
        return ()
    try:
        parts = tuple(shlex.split(text))
    except ValueError as error:
        raise UniadFastError(f"--on-defect {text!r} can't be understood: {error}") from None
    if not parts:
        raise UniadFastError("--on-defect names no program")
    if shutil.which(parts[0]) is None:
        raise UniadFastError(f"--on-defect: there is no program {parts[0]!r} that can be run here")
    return parts
