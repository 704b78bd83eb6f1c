"""What the commands of the command line share: options, and how errors end."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

ERROR = 2
_USER_ERRORS = (OSError, ValueError)  # every error class of the package is a ValueError

RecipeName = Literal["fast", "paper"]
ImageScore = Literal["max", "mean", "std"]
Score = Literal["l2", "whitened", "relative"]

DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder of classes (CLASS/train/good, CLASS/test/..., CLASS/ground_truth/...), a folder of good "
        "images, a metadata file (.json, .jsonl, VisA's .csv), or elpv.",
    ),
]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that paths in a metadata file start from.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
CacheDirectory = Annotated[
    Path | None, typer.Option("--cache", help="Folder for extracted features. Default: the user's cache.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """User errors become one message and exit code 2; Ctrl-C becomes 130."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except _USER_ERRORS as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(ERROR) from None

    return wrapped


def exit_if_unreadable(messages: Sequence[str]) -> None:
    for message in messages:
        typer.echo(f"left out: {message}", err=True)
    if messages:
        raise typer.Exit(ERROR)
