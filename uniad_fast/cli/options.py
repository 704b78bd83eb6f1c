"""What the commands of the command line share: options, how they speak, and how they end.

Exit codes: 0 all good; 1 `score` found something defective; 2 the command could not be done, or was wrong; 3 it was
done, but some images could not be read; 70 a fault of this program; 128 + n a signal n.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data.datasets import composition
from ..data.samples import Dataset
from ..detect.detector import AnomalyDetector
from ..detect.results import table
from ..errors import UniadFastError
from ..files import WATCH_LOCK, locked
from ..image_size import Size, read_size
from ..printable import printable, printable_lines
from ..signals import Stopped, noted
from ..training.processes import current, joined, started_as

DEFECTIVE, ERROR, INCOMPLETE, FAULT, SIGNAL = 1, 2, 3, 70, 128
_LISTED = 20
_TOGETHER = ("train", "evaluate_command", "score", "study")  # what several processes do together
_REPORT = "This is a fault of uniad_fast, not of yours: please report it with the lines above."

RecipeName = Literal["fast", "paper"]
ImageScore = Literal["max", "mean", "std"]
ResidualScore = Literal["l2", "whitened", "relative", "gaussian"]

DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder of classes (CLASS/train/good, CLASS/test/..., CLASS/ground_truth/... and others, see "
        "docs/guide/data.md), a folder of good images, a metadata file (.json, .jsonl, VisA's .csv), or elpv.",
    ),
]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that paths in a metadata file start from.")]
AllGood = Annotated[
    bool, typer.Option("--all-good", help="Every image in the folder is good, whatever its folders are called.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
CacheDirectory = Annotated[
    Path | None, typer.Option("--cache", help="Folder for extracted features. Default: the user's cache.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no features: extract them whenever they are needed.")]
CachePrecision = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Of kept features; the last two take half the room.")
]
BatchSize = Annotated[int, typer.Option(min=1, max=4096, help="Images at a time.")]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME|FILE",
        help="What runs the backbone, or all: torch, openvino, onnxruntime, or an exported file; auto is the fastest "
        "that gives the same scores.",
    ),
]
EnginePrecision = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(
        "--engine-precision", help="bfloat16 is faster on most processors that have it; close verdicts change."
    ),
]


def read_image_size(text: Any) -> Size:
    """`read_size` as a parser of an option."""
    try:
        return read_size(str(text))
    except UniadFastError as error:
        raise typer.BadParameter(str(error)) from None


ImageSize = Annotated[
    Any,  # typer would take a pair for two words, and knows no choice of types
    typer.Option(
        parser=read_image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="Pixels that images are resized to: the side of a square, or height and width, such as 256x512.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything that is drawn.")]
Roi = Annotated[Path | None, typer.Option(metavar="MASK", help="Picture that is black where images are not looked at.")]
FalseAlarmRate = Annotated[float, typer.Option(help="Share of good images that may be called defective.")]


def _allow_pixels(pixels: int | None) -> int | None:
    if pixels is not None:
        from ..data.images import allow_pixels

        allow_pixels(pixels)
    return pixels


MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, callback=_allow_pixels, help="Largest image to read, in pixels. Default: 178,956,970."),
]


def cache_of(cache: Path | None, no_cache: bool) -> Path | Literal[False] | None:
    """A detector's `cache_dir`; UniadFastError for a folder that nothing would be kept in."""
    if no_cache and cache is not None:
        raise UniadFastError(f"--cache {cache} says where to keep features and --no-cache keeps none: give one of them")
    return False if no_cache else cache


def say(text: object, err: bool = False) -> None:
    """Print, with whatever a terminal might obey written as an escape sequence. A reader that has left is no error."""
    with contextlib.suppress(BrokenPipeError):
        typer.echo(printable_lines(text), err=err)


def finish(unreadable: Sequence[str], code: int = 0) -> None:
    """End a command that is done: list what could not be read, and exit with `INCOMPLETE` if there is any."""
    list_problems("left out", unreadable)
    raise typer.Exit(INCOMPLETE if unreadable else code)


def list_problems(what: str, messages: Sequence[str]) -> None:
    """Print a line for each message on stderr, up to a number; one of several processes does."""
    if not current().is_first:
        return
    for message in messages[:_LISTED]:
        say(f"{what}: {message}", err=True)
    if len(messages) > _LISTED:
        say(f"... and {len(messages) - _LISTED} more {what}", err=True)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command with errors as messages and exit codes, see the module."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with noted():
                _run(command, *args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except Stopped as stopped:
            say(stopped, err=True)
            raise typer.Exit(SIGNAL + stopped.number) from None
        except KeyboardInterrupt:
            say("interrupted", err=True)
            raise typer.Exit(SIGNAL + signal.SIGINT) from None
        except BrokenPipeError:
            raise typer.Exit(ERROR) from None
        except (UniadFastError, OSError) as error:
            say(f"error: {error}", err=True)
            raise typer.Exit(ERROR) from None
        except Exception as error:
            if _is_out_of_memory(error):
                say(f"error: out of memory ({error}): try a smaller --batch-size or --image-size", err=True)
                raise typer.Exit(ERROR) from None
            say(traceback.format_exc(), err=True)
            say(_REPORT, err=True)
            raise typer.Exit(FAULT) from None

    return wrapped


def _run(command: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run the command, together with the processes that this one was started with; the first one speaks.

    torchrun takes every exit code but 0 for a process that has failed, so there is no other where all is done.
    """
    if started_as()[1] == 1:
        command(*args, **kwargs)
        return
    if command.__name__ not in _TOGETHER:
        raise UniadFastError(
            f"{command.__name__} is one process's work: start it without torchrun, or with one process"
        )
    with joined() as together, contextlib.ExitStack() as stack:
        if not together.is_first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            kwargs |= {"quiet": True} if "quiet" in kwargs else {}
        try:
            command(*args, **kwargs)
        except typer.Exit as ended:
            if ended.exit_code not in (0, DEFECTIVE, INCOMPLETE):
                raise


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    return (
        torch is not None
        and isinstance(error, (torch.OutOfMemoryError, RuntimeError))
        and (
            isinstance(error, torch.OutOfMemoryError)
            or "not enough memory" in str(error)
            or "can't allocate memory" in str(error)
        )
    )


def set_engine(
    detector: AnomalyDetector, name: str, precision: str, paths: Sequence[Path], batch: int, quiet: bool
) -> None:
    """Let the detector measure these images by an engine, and say what was found out about engines."""
    from ..deploy.engines import use_engine

    options: dict[str, Any] = {"precision": precision, "count": len(paths), "batch": batch, "quiet": quiet}
    choice = use_engine(detector, name, paths, **options)
    if choice.note:
        say(f"note: {choice.note}", err=True)


def show_data(dataset: Dataset) -> None:
    """What will be looked at, class by class, and what will not."""
    header = ["class", "good to learn from", "to test on", "masks"]
    rows = composition(dataset)
    say(table(header, [[printable(name), str(good), tested, masks] for name, good, tested, masks in rows]))
    list_problems("not looked at", dataset.notes)


def check_folder(folder: Path | None, alone: bool = False) -> None:
    """UniadFastError where results can't go into it, which is better known before the work.

    alone: nor if a watch writes its rows there, which others' would replace.
    """
    if alone and folder is not None and current().is_first and (folder / WATCH_LOCK).exists():
        with locked(folder / WATCH_LOCK, wait=False) as is_free:
            if not is_free:
                raise UniadFastError(f"uniad-fast watch writes into {folder}: choose another folder")
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder is not None and not folder.is_dir():
        raise UniadFastError(f"{folder} is a file, and results need a folder")
    if folder is not None and not os.access(folder, os.W_OK):
        raise UniadFastError(f"{folder} can't be written to")


def threshold_sentence(detector: AnomalyDetector) -> str:
    """The threshold, where it comes from, and what it promises."""
    calibration = detector.calibration
    threshold = calibration.threshold
    low, high = threshold.interval
    how = (
        "too few to show it: estimated from how their scores thin out" if threshold.extrapolated
        else "as their own scores show"
    )  # fmt: skip
    return (
        f"threshold {threshold.value:.3f} standard deviations above what good images have, from "
        f"{calibration.good_images} of them: {_percent(threshold.rate)} false alarms ({_percent(low)} to "
        f"{_percent(high)} with 95% confidence; {how})"
    )


def _percent(share: float) -> str:
    """With a digit after the point, or, where that would be 0.0%, as small as it is."""
    return f"{share:.1%}" if share >= 5e-4 or not share else f"{100 * share:.1g}%"


def recognition_sentence(detector: AnomalyDetector) -> str | None:
    """How well classes are told apart, where there are several."""
    found = detector.trained.recognition
    if found is None or not found.images:
        return None
    return (
        f"classes are recognized: of {found.images} good images, held out in turns, {found.wrong} were taken for "
        f"another class and {found.unsure} for none"
    )
