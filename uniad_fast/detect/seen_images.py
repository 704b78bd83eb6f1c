"""Which images a detector has learnt from, by their content: copies tell nothing new, and what was learnt from says
nothing about images that were not.
"""

from collections.abc import Sequence

from ..data.features import digest
from ..data.samples import DataError, Sample
from ..printable import printable

LEARNT_FROM = "learnt from"
"""Their name in a bundle's `trained_with`."""
_DIGITS = 12
_MOST = 20_000
"""Images that a detector remembers, a quarter of a megabyte."""


def without_copies(samples: Sequence[Sample], notes: list[str]) -> list[Sample]:
    """Each class's images, the first of those with the same content; a note says how many others there were.

    A copy that is held out to set a threshold by would score as an image that was trained on.
    """
    kept: dict[object, Sample] = {}
    copies: list[Sample] = []
    for sample in samples:
        what = (sample.class_name, digest(sample.path) or sample.path)
        if what in kept:
            copies.append(sample)
        kept.setdefault(what, sample)
    if copies:
        shown = f"{len(copies)} images are copies of others, such as {printable(copies[0].path)}: each is used once"
        notes.append(shown)
    return list(kept.values())


def marks_of(samples: Sequence[Sample], before: str = "") -> str:
    """What `refuse_if_seen` knows the images by: the beginnings of their digests in a row, those of the smallest.

    before: those of images that it has learnt from earlier.
    """
    found = _apart(before) | {content[:_DIGITS] for sample in samples if (content := digest(sample.path))}
    return "".join(sorted(found)[:_MOST])


def refuse_if_seen(samples: Sequence[Sample], marks: str) -> None:
    """DataError if any image is one of those that `marks_of` was told."""
    known = _apart(marks)
    seen = [s for s in samples if known and (content := digest(s.path)) and content[:_DIGITS] in known]
    if seen:
        raise DataError(
            f"the detector has learnt from {len(seen)} of these {len(samples)} images, such as "
            f"{printable(seen[0].path)}: they score lower than others, and a threshold from them is too low. Give good "
            "images that it has not seen"
        )


def _apart(marks: str) -> set[str]:
    return {marks[at : at + _DIGITS] for at in range(0, len(marks), _DIGITS)}
