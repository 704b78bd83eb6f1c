"""Folders that may hold something else than they should: a defect that is learnt as good is never found again."""

from pathlib import Path

from ..printable import printable
from .folder_names import (
    MASK_STEM,
    MASKS,
    TEST,
    TRAIN,
    UNLABELLED,
    VALIDATION,
    folders,
    is_called_defective,
    is_defective,
    is_defective_alone,
    is_doubtful,
    listed,
    shown,
)
from .image_files import find_images
from .samples import DataError, is_good

_MOST_FOLDERS = 10_000


def refuse_if_doubtful(root: Path) -> None:
    """DataError if anything in this folder of good images looks like defects, tests or masks."""
    own = root.name.lower()
    doubtful = [root] if own in TEST | MASKS or is_defective_alone(root.name) or UNLABELLED.match(own) else []
    doubtful += _doubtful_below(root)
    images = find_images(root).images
    masks = [path for path in images if MASK_STEM.search(path.stem)]
    defects = [path for path in images if is_called_defective(path.stem)]
    good = [child for child in folders(root) if is_good(child.name)]
    beside = [child for child in folders(root) if child not in good] if good else []
    if not doubtful and not masks and not defects and not beside:
        return
    reasons = [listed(shown(folder, root) for folder in sorted(doubtful))] if doubtful else []
    reasons += [f"{listed(c.name for c in beside)} beside {good[0].name}"] if beside and not doubtful else []
    reasons += [f"masks such as {printable(masks[0].name)}"] if masks and not doubtful else []
    reasons += [f"images called like defects, such as {printable(defects[0].name)}"] if defects and not doubtful else []
    raise DataError(
        f"{root} may hold more than good images: {'; '.join(reasons)}. It is in none of the layouts that are known "
        "(docs/guide/data.md). Give the folder of good images itself, or, if every image in it is good, add --all-good"
    )


def refuse_if_mixed(pictures: Path, folder: Path) -> None:
    """DataError if the folder of one kind of image holds folders of others, or parts of another layout."""
    own = not is_good(pictures.name) and pictures.name.lower() != "rgb"
    mixed = [p for p in _doubtful_below(pictures) if not (own and is_defective(p.name))]
    if not is_good(pictures.name) and pictures.name.lower() != "rgb":
        mixed += [child for child in folders(pictures) if is_good(child.name)]
    if mixed:
        raise DataError(
            f"{shown(pictures, folder)} should hold one kind of image, but in it lies "
            f"{listed(p.name for p in mixed)}: move that elsewhere"
        )


def _doubtful_below(folder: Path) -> list[Path]:
    """Folders somewhere below whose names speak of something else than good images; links are followed, each once."""
    doubtful: list[Path] = []
    pending, seen = folders(folder), {folder.resolve()}
    while pending and len(seen) < _MOST_FOLDERS:
        below = pending.pop()
        place = below.resolve()
        name = below.name.lower()
        if is_doubtful(below.name) or name in TRAIN | VALIDATION or UNLABELLED.match(name):
            doubtful.append(below)
        elif place not in seen:
            pending += folders(below)
        seen.add(place)
    return doubtful
