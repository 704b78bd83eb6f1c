"""The command line: uniad-fast and its commands, a file each."""

from typing import Annotated

import typer

from .. import __version__
from .calibrate import calibrate
from .convert import convert
from .demo import demo
from .doctor import diagnose
from .engines import engines, remembered
from .eval import evaluate_command
from .export import export
from .options import ERROR, reports_errors, say
from .report import report
from .score import score
from .serve import serve
from .study import data_app, study
from .train import train
from .watch import watch

app = typer.Typer(
    help="Find and locate visual defects: one model for many product classes, trained from good images only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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


for command in (demo, train, score, calibrate, export, engines, report, serve, watch, convert, study):
    app.command()(reports_errors(command))
app.command("eval")(reports_errors(evaluate_command))
app.add_typer(data_app, name="data")


@app.command()
@reports_errors
def doctor() -> None:
    """Say what runs on this machine, and what does not and why."""
    lines, sound = diagnose()
    say("\n".join(lines))
    say("\n".join(remembered()))
    raise typer.Exit(0 if sound else ERROR)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
