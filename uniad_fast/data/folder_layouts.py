"""Folders of images as people have them, told apart by the names of their sub-folders (in any case).

    split      CLASS/train/good, CLASS/test/{good,DEFECT}, CLASS/ground_truth/DEFECT: MVTec AD, MPDD, BTAD;
               with validation/good, learnt from too: MVTec LOCO; with test_public and its own ground_truth: MVTec AD 2;
               with rgb, xyz and gt in each kind, of which rgb and gt are looked at: MVTec 3D-AD
    raw        CLASS/Data/Images/{Normal,Anomaly}, CLASS/Data/Masks/Anomaly: VisA
    kinds      CLASS/{good,DEFECT}, with or without masks: good images are split by the seed
    good only  images anywhere below, and no folder whose name speaks of defects, tests or masks

A class lies in a folder of its own, or the folder itself is the only class. Whatever else there is, is refused by name:
a defect that is learnt as good is never found again.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..printable import printable
from .images import EXTENSIONS, find_images
from .samples import GOOD, DataError, Dataset, Sample, hold_out, is_good

_TRAIN = frozenset({"train", "training"})
_TEST = frozenset({"test", "testing", "test_public"})
_VALIDATION = frozenset({"validation", "valid", "val"})
_MASKS = frozenset(
    {"ground_truth", "groundtruth", "gt", "mask", "masks", "label", "labels", "annotation", "annotations"}
)
_DEFECTS = frozenset(
    [
        "bad",
        "ng",
        "nok",
        "ko",
        "nio",
        "fail",
        "failed",
        "faulty",
        "broken",
        "damaged",
        "defect",
        "defects",
        "defective",
        "anomaly",
        "anomalies",
        "anomalous",
        "abnormal",
        "scratch",
        "crack",
    ]
)
_UNLABELLED = re.compile(r"test_private(_.*)?$")
_MASK_STEM = re.compile(r"[_-](mask|gt|label|ground_truth)$", re.IGNORECASE)
_NOT_GOOD = _TEST | _MASKS | _DEFECTS
_MOST_FOLDERS = 10_000
_SHARE_OF_TEST = 0.2  # of good images, where the layout brings no split


def load_folder(root: Path, seed: int, all_good: bool) -> Dataset:
    """The data set in a folder, by the first layout of the module's table that fits.

    Raises:
        DataError: a folder may hold defects, masks or tests, and no layout says which.
    """
    root = root.resolve()
    notes: list[str] = []
    if all_good:
        return Dataset(root.name, _images(root, root, root.name, GOOD, notes), [], notes)
    if _is_class(root):
        return _load_classes(root, [root], seed, notes)
    children = _folders(root)
    classes = [child for child in children if child.name.lower() not in _NOT_GOOD and _is_class(child)]
    if not classes:
        _refuse_if_doubtful(root)
        return Dataset(root.name, _images(root, root, root.name, GOOD, notes), [], notes)
    others = [child for child in children if child not in classes and find_images(child).images]
    if others:
        raise DataError(
            f"{root}: {_listed(c.name for c in classes)} lie there as classes with their splits, but in "
            f"{_listed(c.name for c in others)} there are images and no such folders: move them elsewhere, or give "
            "the classes' own folders"
        )
    loose = [p for p in root.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS]
    if loose:
        notes.append(f"{len(loose)} images beside the classes' folders")
    return _load_classes(root, classes, seed, notes)


def _is_class(folder: Path) -> bool:
    return _is_split(folder) or _is_raw(folder) or _is_kinds(folder)


def _is_split(folder: Path) -> bool:
    return bool(_named(folder, _TRAIN)) and (folder.name.lower() not in _TRAIN | _TEST)


def _is_raw(folder: Path) -> bool:
    images = _below(folder, "data", "images")
    return images is not None and any(is_good(child.name) for child in _folders(images))


def _is_kinds(folder: Path) -> bool:
    """Good and defective images side by side, and nothing that is neither."""
    names = {child.name.lower() for child in _folders(folder)}
    good, defects = {n for n in names if is_good(n)}, names & _DEFECTS
    return bool(good and defects) and names <= good | defects | _MASKS and folder.name.lower() not in _TEST | _TRAIN


def _load_classes(root: Path, classes: list[Path], seed: int, notes: list[str]) -> Dataset:
    train: list[Sample] = []
    test: list[Sample] = []
    for folder in classes:
        if _is_split(folder):
            good, tested = _load_split(folder, notes)
        elif _is_raw(folder):
            good, tested = _load_raw(folder, seed, notes)
        else:
            good, tested = _load_kinds(folder, seed, notes)
        if not good:
            raise DataError(f"{folder}: no good image to learn from")
        train += good
        test += tested
    return Dataset(root.name, train, test, notes)


def _load_split(folder: Path, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    train: list[Sample] = []
    test: list[Sample] = []
    used = {*_named(folder, _TRAIN), *_named(folder, _VALIDATION), *_named(folder, _TEST), *_named(folder, _MASKS)}
    for part in (*_named(folder, _TRAIN), *_named(folder, _VALIDATION)):
        kinds = _folders(part)
        good = [kind for kind in kinds if is_good(kind.name)]
        if not good and find_images(part).images:
            raise DataError(
                f"{part}: none of its folders ({_listed(k.name for k in kinds) or 'it has none'}) is called good, ok "
                "or normal, so it may hold defects. If all of its images are good, give it by itself with --all-good"
            )
        for kind in good:
            _refuse_if_mixed(_pictures(kind), folder)
            train += _images(_pictures(kind), kind, folder.name, GOOD, notes)
        for kind in kinds:
            if kind not in good and (count := len(find_images(kind).images)):
                notes.append(f"{_shown(kind, folder)}: {count} images, to learn from are those in {good[0].name} alone")
        _note_loose(part, folder, notes)
    for part in _named(folder, _TEST):
        own_masks = _named(part, _MASKS)
        masks = [*own_masks, *_named(folder, _MASKS)]
        for kind in _folders(part):
            if kind not in own_masks:
                test += _kind(kind, folder, masks, notes)
        _note_loose(part, folder, notes)
    for other in _folders(folder):
        if other not in used and (count := len(find_images(other).images)):
            why = "without labels" if _UNLABELLED.match(other.name.lower()) else "neither train, validation nor test"
            notes.append(f"{_shown(other, folder)}: {count} images, {why}")
    _note_loose(folder, folder, notes)
    return train, test


def _load_raw(folder: Path, seed: int, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    images, masks = _below(folder, "data", "images"), _below(folder, "data", "masks")
    assert images is not None
    return _split_kinds(images, folder, [masks] if masks else [], seed, notes)


def _load_kinds(folder: Path, seed: int, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    return _split_kinds(folder, folder, _named(folder, _MASKS), seed, notes)


def _split_kinds(
    part: Path, folder: Path, masks: list[Path], seed: int, notes: list[str]
) -> tuple[list[Sample], list[Sample]]:
    """Kinds without a split: defective images are for testing, good ones are split by the seed."""
    good: list[Sample] = []
    test: list[Sample] = []
    for kind in _folders(part):
        if kind not in masks:
            samples = _kind(kind, folder, masks, notes)
            (good if is_good(kind.name) else test).extend(samples)
    _note_loose(part, folder, notes)
    train, held = hold_out(good, _SHARE_OF_TEST, seed)
    notes.append(f"{printable(folder.name)}: no split, so {len(held)} of {len(good)} good images are kept for testing")
    return train, held + test


def _kind(kind: Path, folder: Path, masks: list[Path], notes: list[str]) -> list[Sample]:
    """The samples in the folder of one kind of image, with their masks."""
    name = GOOD if is_good(kind.name) else kind.name
    pictures = _pictures(kind)
    _refuse_if_mixed(pictures, folder)
    samples = _images(pictures, kind, folder.name, name, notes)
    if name == GOOD:
        return samples
    own = [] if pictures == kind else _named(kind, _MASKS)  # rgb and gt side by side
    finder = _MaskFinder(kind.name, own, masks)
    return [Sample(s.path, s.class_name, name, finder.find(s.path.relative_to(pictures))) for s in samples]


class _MaskFinder:
    """The masks of one kind of defect: by the image's path below its kind, its stem with _mask, _gt, _label or nothing.

    A folder of the stem's name stands for the masks in it. A suffix of any image format will do.
    """

    def __init__(self, kind: str, own: list[Path], masks: list[Path]) -> None:
        self._roots = [*own, *(child for root in masks for child in _folders(root) if child.name == kind)]
        # Masks may lie side by side where there is one kind of defect.
        self._roots += [root for root in masks if not _folders(root)]
        self._known: dict[Path, dict[str, list[Path]]] = {}

    def find(self, image: Path) -> Path | None:
        """The mask of the image with this path below its kind's folder, if there is one.

        Raises:
            DataError: there are several.
        """
        for root in self._roots:
            found = self._in(root / image.parent).get(image.stem.lower(), [])
            exact = [path for path in found if path.stem.lower() != image.stem.lower()] or found
            if len(exact) > 1:
                raise DataError(f"{len(exact)} masks for {printable(image)}: {', '.join(map(printable, exact[:3]))}")
            if exact:
                return exact[0]
        return None

    def _in(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._known:
            stems: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.name.startswith("."):
                    continue
                if path.is_dir():
                    stems.setdefault(path.name.lower(), []).append(path)
                elif path.suffix.lower() in EXTENSIONS:
                    stem = path.stem.lower()
                    for name in {stem, _MASK_STEM.sub("", stem)}:
                        stems.setdefault(name, []).append(path)
            self._known[folder] = stems
        return self._known[folder]


def _refuse_if_doubtful(root: Path) -> None:
    """DataError if anything in this folder of good images looks like defects, tests or masks."""
    own = root.name.lower()
    doubtful = [root] if own in _NOT_GOOD or _UNLABELLED.match(own) else []
    doubtful += _doubtful_below(root)
    masks = [path for path in find_images(root).images if _MASK_STEM.search(path.stem)]
    good = [child for child in _folders(root) if is_good(child.name)]
    beside = [child for child in _folders(root) if child not in good] if good else []
    if not doubtful and not masks and not beside:
        return
    reasons = [_listed(_shown(folder, root) for folder in sorted(doubtful))] if doubtful else []
    reasons += [f"{_listed(c.name for c in beside)} beside {good[0].name}"] if beside and not doubtful else []
    reasons += [f"masks such as {printable(masks[0].name)}"] if masks and not doubtful else []
    raise DataError(
        f"{root} may hold more than good images: {'; '.join(reasons)}. It is in none of the layouts that are known "
        "(docs/data.md). Give the folder of good images itself, or, if every image in it is good, add --all-good"
    )


def _refuse_if_mixed(pictures: Path, folder: Path) -> None:
    """DataError if the folder of one kind of image holds folders of others, or parts of another layout."""
    own = pictures.name.lower() in _DEFECTS
    mixed = [p for p in _doubtful_below(pictures) if not (own and p.name.lower() in _DEFECTS)]
    if not is_good(pictures.name) and pictures.name.lower() != "rgb":
        mixed += [child for child in _folders(pictures) if is_good(child.name)]
    if mixed:
        raise DataError(
            f"{_shown(pictures, folder)} should hold one kind of image, but in it lies "
            f"{_listed(p.name for p in mixed)}: move that elsewhere"
        )


def _doubtful_below(folder: Path) -> list[Path]:
    """Folders somewhere below whose names speak of something else than good images."""
    doubtful: list[Path] = []
    pending, seen = _folders(folder), 0
    while pending and seen < _MOST_FOLDERS:
        below = pending.pop()
        seen += 1
        name = below.name.lower()
        if name in _NOT_GOOD | _TRAIN | _VALIDATION or _UNLABELLED.match(name):
            doubtful.append(below)
        elif not below.is_symlink():
            pending += _folders(below)
    return doubtful


def _images(folder: Path, shown: Path, class_name: str, kind: str, notes: list[str]) -> list[Sample]:
    found = find_images(folder)
    if found.others:
        what = ", ".join(f"{count} {suffix}" for suffix, count in sorted(Counter(found.others).items()))
        notes.append(f"{printable(shown)}: {what} ({'no image' if len(found.others) == 1 else 'no images'})")
    notes += found.problems
    return [Sample(path, class_name, kind) for path in found.images]


def _pictures(kind: Path) -> Path:
    """Where a kind's pictures lie: in MVTec 3D-AD, beside its point clouds and masks."""
    return _below(kind, "rgb") or kind


def _note_loose(part: Path, folder: Path, notes: list[str]) -> None:
    loose = [p for p in part.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS]
    if loose:
        notes.append(f"{_shown(part, folder)}: {len(loose)} images in none of its folders")


def _folders(folder: Path) -> list[Path]:
    """Sub-folders, sorted, hidden ones left out, and those that can't be listed empty."""
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    except OSError:
        return []


def _named(folder: Path, names: frozenset[str]) -> list[Path]:
    return [child for child in _folders(folder) if child.name.lower() in names]


def _below(folder: Path, *names: str) -> Path | None:
    """The sub-folder of this path, in any case."""
    for name in names:
        found = _named(folder, frozenset({name}))
        if not found:
            return None
        folder = found[0]
    return folder


def _shown(folder: Path, root: Path) -> str:
    return printable(folder.relative_to(root.parent))


def _listed(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
