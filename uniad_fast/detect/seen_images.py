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
    for sample in samples:
        content = digest(sample.path)
        kept.setdefault((sample.class_name, content or sample.path), sample)
    if copies := len(samples) - len(kept):
        known = {id(sample) for sample in kept.values()}
        first = next(sample for sample in samples if id(sample) not in known)
        notes.append(f"{copies} images are copies of others, such as {printable(first.path)}: each is used once")
    return list(kept.values())


def marks_of(samples: Sequence[Sample]) -> str:
    """What `refuse_if_seen` knows the images by: the beginnings of their digests in a row, those of the smallest."""
    found = sorted({content[:_DIGITS] for sample in samples if (content := digest(sample.path))})
    return "".join(found[:_MOST])


def refuse_if_seen(samples: Sequence[Sample], marks: str) -> None:
    """DataError if any image is one of those that `marks_of` was told."""
    known = {marks[at : at + _DIGITS] for at in range(0, len(marks), _DIGITS)}
    seen = [s for s in samples if known and (content := digest(s.path)) and content[:_DIGITS] in known]
    if seen:
        raise DataError(
            f"the detector has learnt from {len(seen)} of these {len(samples)} images, such as "
            f"{printable(seen[0].path)}: they score lower than others, and a threshold from them is too low. Give good "
            "images that it has not seen"
        )
