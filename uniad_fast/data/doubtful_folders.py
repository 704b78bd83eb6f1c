"""Folders that may hold something else than they should: a defect that is learnt as good is never found again."""

from pathlib import Path

from ..printable import printable
from .folder_names import DEFECTS, MASK_STEM, NOT_GOOD, TRAIN, UNLABELLED, VALIDATION, folders, listed, shown
from .image_files import find_images
from .samples import DataError, is_good

_MOST_FOLDERS = 10_000


def refuse_if_doubtful(root: Path) -> None:
    """DataError if anything in this folder of good images looks like defects, tests or masks."""
    own = root.name.lower()
    doubtful = [root] if own in NOT_GOOD or UNLABELLED.match(own) else []
    doubtful += _doubtful_below(root)
    masks = [path for path in find_images(root).images if MASK_STEM.search(path.stem)]
    good = [child for child in folders(root) if is_good(child.name)]
    beside = [child for child in folders(root) if child not in good] if good else []
    if not doubtful and not masks and not beside:
        return
    reasons = [listed(shown(folder, root) for folder in sorted(doubtful))] if doubtful else []
    reasons += [f"{listed(c.name for c in beside)} beside {good[0].name}"] if beside and not doubtful else []
    reasons += [f"masks such as {printable(masks[0].name)}"] if masks and not doubtful else []
    raise DataError(
        f"{root} may hold more than good images: {'; '.join(reasons)}. It is in none of the layouts that are known "
        "(docs/guide/data.md). Give the folder of good images itself, or, if every image in it is good, add --all-good"
    )


def refuse_if_mixed(pictures: Path, folder: Path) -> None:
    """DataError if the folder of one kind of image holds folders of others, or parts of another layout."""
    own = pictures.name.lower() in DEFECTS
    mixed = [p for p in _doubtful_below(pictures) if not (own and p.name.lower() in DEFECTS)]
    if not is_good(pictures.name) and pictures.name.lower() != "rgb":
        mixed += [child for child in folders(pictures) if is_good(child.name)]
    if mixed:
        raise DataError(
            f"{shown(pictures, folder)} should hold one kind of image, but in it lies "
            f"{listed(p.name for p in mixed)}: move that elsewhere"
        )


def _doubtful_below(folder: Path) -> list[Path]:
    """Folders somewhere below whose names speak of something else than good images."""
    doubtful: list[Path] = []
    pending, seen = folders(folder), 0
    while pending and seen < _MOST_FOLDERS:
        below = pending.pop()
        seen += 1
        name = below.name.lower()
        if name in NOT_GOOD | TRAIN | VALIDATION or UNLABELLED.match(name):
            doubtful.append(below)
        elif not below.is_symlink():
            pending += folders(below)
    return doubtful
