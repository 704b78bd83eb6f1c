"""uniad-fast engines: how fast a detector is by each engine on this machine."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.image_files import list_images
from ..deploy.engine_files import all_tables
from ..deploy.examine import Examined, examine, rows_of
from ..detect.detector import AnomalyDetector
from ..detect.results import table
from ..errors import UniadFastError
from ..printable import printable
from .options import Quiet, finish, say


def engines(
    bundle: Annotated[Path, typer.Argument(help="Folder that train wrote.")],
    images: Annotated[Path, typer.Argument(help="Some good images: a few of them are measured.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, max=4096, help="May be given again. 1, 16, 32")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure every engine that is installed with a bundle, and remember which is fastest for `--engine auto`.

    Exit code: 0 done, 2 an error.
    """
    detector = AnomalyDetector.load(bundle, "cpu")
    paths = list_images(images)
    if not paths:
        raise UniadFastError(f"{images}: no image to measure")
    say(_table(examine(detector, paths, batch_size or [1, 16, 32], quiet=quiet)))
    finish([])


def remembered() -> list[str]:
    """Lines about what is remembered of this machine, for `doctor`."""
    lines = []
    for about, rows in all_tables():
        lines.append(f"engines, {printable(about)}:")
        lines += [f"  {line}" for line in _table(rows_of(rows)).splitlines()]
    return lines or ["engines: none measured here yet; uniad-fast engines BUNDLE IMAGES does"]


def _table(rows: Iterable[Examined]) -> str:
    header = ["engine", "batch", "ms an image", "load, s", "score off by", "map off by", ""]
    return table(header, [_cells(row) for row in sorted(rows, key=lambda row: (row.batch, row.image))])


def _cells(row: Examined) -> list[str]:
    if row.problem:
        return [str(row.plan), str(row.batch), *["-"] * 4, printable(row.problem)]
    figures: list[Any] = [f"{row.image * 1e3:.2f}", f"{row.load:.2f}", f"{row.score:.2g}", f"{row.map:.2g}"]
    return [str(row.plan), str(row.batch), *figures, "" if row.agrees else "not taken"]
