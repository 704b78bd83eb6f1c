"""Which files in a folder are images, and what else lies there."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..printable import printable

EXTENSIONS = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".gif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".avif",
        ".mpo",
    ]
)


@dataclass(frozen=True)
class Found:
    """What lies in a folder: image files in order, files that were not looked at by kind, and what went wrong."""

    images: list[Path]
    others: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files in a folder and below, in sorted order; hidden files and folders are left out."""
    return find_images(folder).images


def find_images(folder: str | os.PathLike, leave_out: str | os.PathLike | None = None) -> Found:
    """What lies in a folder and below. Links are followed, but not into a folder that contains them.

    Hidden files and folders are left out without a word, and so is the folder `leave_out`.
    """
    folder = Path(folder)
    found = Found([])
    excluded = os.path.realpath(leave_out) if leave_out is not None else None
    for path in _files(folder, (), excluded, found.problems):
        if path.suffix.lower() in EXTENSIONS:
            found.images.append(path)
        else:
            found.others[path.suffix.lower() or "no extension"] += 1
    found.images.sort()
    return found


def _files(folder: Path, above: tuple[str, ...], excluded: str | None, problems: list[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        problems.append(f"{printable(folder)}: a link to a folder that contains it")
        return
    if real == excluded:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{printable(folder)}: {error.strerror}")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir():
                yield from _files(folder / entry.name, (*above, real), excluded, problems)
            elif entry.is_file():
                yield folder / entry.name
            elif entry.is_symlink():
                problems.append(f"{printable(folder / entry.name)}: a link to nothing")
        except OSError as error:
            problems.append(f"{printable(folder / entry.name)}: {error.strerror}")
